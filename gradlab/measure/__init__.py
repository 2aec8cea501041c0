"""Measurements: on nets that are not trained, in float64, through the probes or by hand; and of what nets learn.

Experiments share them, since experiments never import each other. Each returns plain numbers or a Trace.
"""
