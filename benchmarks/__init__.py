"""What Bamboo costs, measured on real processes. `python -m benchmarks` asks, `README.md` has the answers."""
