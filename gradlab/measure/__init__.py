"""Measurements on nets that are not trained: one forward and backward pass, in float64, through the probes or by hand.

Experiments share them, since experiments never import each other. Each returns plain numbers or a Trace.
"""
