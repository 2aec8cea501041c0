"""Thin adapters: training loops of others that are watched, and loggers of others that show a trace.

`lightning` and `huggingface` put `gl.watch` around a trainer's own loop; `tensorboard`, `wandb` and `mlflow` write what
a trace recorded as scalars. Each is a module of its own and needs its extra: `pip install 'gradlab[lightning]'`.
"""
