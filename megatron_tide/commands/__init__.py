"""One file per command: its arguments, and a ``run`` that calls the package. ``python -m megatron_tide`` lists them."""
