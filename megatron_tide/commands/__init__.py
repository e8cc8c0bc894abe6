"""One file per command: its arguments, and a ``run`` that calls the rooms. ``python -m megatron_tide`` lists them."""
