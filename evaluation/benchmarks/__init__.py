"""Speed and memory, each as a ratio of two things measured in one run: `python -m evaluation.benchmarks`."""
