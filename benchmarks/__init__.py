"""What gradlab is measured by: the cost of watching, and the zoo of labelled nets; shipped as `gradlab.benchmarks`."""
