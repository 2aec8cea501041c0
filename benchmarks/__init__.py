"""What watching costs, and what diagnoses are worth on a zoo of labelled nets; installed as `gradlab.benchmarks`."""
