"""One rank of test_distributed: trains the same small net bare, under DDP and under FSDP2, and writes what it saw."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from gradlab.errors import UsageError
from gradlab.probes import sharded, watch

WORLD, BATCH, STEPS = 2, 4, 3


def net():
    torch.manual_seed(3)  # 5 rows over 2 ranks: shards of different sizes
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def batch(rank):
    """Return the batch of a rank; of no rank, the batches of all joined."""
    generator = torch.Generator().manual_seed(8)
    x, y = torch.randn(WORLD * BATCH, 3, generator=generator), torch.randn(WORLD * BATCH, 2, generator=generator)
    mine = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    return x[mine], y[mine]


def train(model, rank, *, watched=True, kind=torch.optim.AdamW):
    """Return the trace, or None for a bare run, and what a run leaves behind."""
    optimizer = kind(model.parameters(), lr=0.05)
    x, y = batch(rank)
    probe = watch(model, optimizer) if watched else None
    left = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        left += [loss.detach(), *(whole(p.grad) for p in model.parameters())]
        optimizer.step()
    if probe is not None:
        probe.close()
    return None if probe is None else probe.trace, [*left, *(whole(p) for p in model.parameters())]


def whole(x):
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def fsdp(**options):
    from torch.distributed.fsdp import fully_shard  # takes seconds, and only ranks need it

    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def extremes(mesh):
    """Return norms of sharded parameters whose squares leave float32, or float64, or are not numbers."""
    from torch.distributed.tensor import Shard, distribute_tensor

    values = {
        "tiny": torch.full((4,), 1e-30),
        "huge": torch.full((4,), 1e30),
        "wide": torch.full((4,), 1e200, dtype=torch.float64),
        "zero": torch.zeros(4),
        "nan": torch.tensor([1.0, 2.0, 3.0, float("nan")]),
    }
    model = nn.ParameterDict({n: nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for n, v in values.items()})
    with watch(model) as probe:
        for param in model.values():
            param.grad = param.detach() * 2
        probe.step()
    return probe.trace.params[["param", "weight_norm", "grad_norm", "grad_nonfinite"]].to_json(orient="records")


def main(rank, store, target):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=limit)
    mesh = init_device_mesh("cpu", (WORLD,))
    ways = {
        "ddp": lambda: nn.parallel.DistributedDataParallel(net()),
        "fsdp": lambda: fsdp(mesh=mesh),
        "fsdp_not_resharded": lambda: fsdp(mesh=mesh, reshard_after_forward=False),
    }
    found = {}
    for name, make in ways.items():
        trace, watched = train(make(), rank)
        _, bare = train(make(), rank, watched=False)
        found[name] = {
            "same": len(watched) == len(bare) and all(map(torch.equal, watched, bare)),
            "params": json.loads(trace.params.to_json(orient="records")),
            "steps": json.loads(trace.steps.to_json(orient="records")),
            "layers": json.loads(trace.layers.to_json(orient="records")),
            "not_seen": trace.info["not_seen"],
        }
    found["extremes"] = json.loads(extremes(mesh))

    late = net()
    with watch(late, torch.optim.SGD(late.parameters(), lr=0.1)) as probe:
        fully_shard(late, mesh=mesh)
        optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
        probe.follow(optimizer)
        late(batch(rank)[0]).sum().backward()
        optimizer.step()
    found["late"] = {"not_seen": probe.trace.info["not_seen"], "norms": int(probe.trace.params["grad_norm"].count())}

    sharded.PATIENCE = 2.0
    distributed.barrier()
    if rank == 0:  # the other rank does not watch: one clear sentence after a while, not a hang
        try:
            watch(fsdp(mesh=mesh))
        except UsageError as error:
            found["alone"] = str(error)
    distributed.barrier()
    if rank == 1:
        next(sharded._meetings)  # what rank 0 counted in vain
    try:
        watch(fsdp(mesh=mesh), every=1 + rank)
    except UsageError as error:
        found["unlike"] = str(error)
    Path(target).write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
