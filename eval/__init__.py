"""How results are counted: data sets, protocols, metrics, benchmarks."""
