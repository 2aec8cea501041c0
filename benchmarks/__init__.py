"""What gradlab is measured by: the cost of watching, and the zoo of labelled nets; installed as `gradlab.benchmarks`."""
