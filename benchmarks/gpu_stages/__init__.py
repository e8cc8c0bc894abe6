"""The stages of benchmarks/gpu.py, each a function ``run(bench)`` in a process of its own."""
