"""The steps of benchmarks/gpu_trial.py, one module per group; each has run(steps)."""
