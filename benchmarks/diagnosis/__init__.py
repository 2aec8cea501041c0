"""A zoo of small networks, healthy and sick, and what rules of diagnosis make of it.

from gradlab.benchmarks.diagnosis.zoo import cases, record

traces = {case.name: record(case) for case in cases("tune")}
"""
