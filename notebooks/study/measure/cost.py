"""What each system of Table 1 costs beside its quality: parameters, updates, training, and a nodule (`table1_costs.csv`)."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from hrldm.insertion.generator import Request
from hrldm.train.device import device
from hrldm.train.loop import read_history
from study.measure.timing import measure
from study.study import Study
from study.systems.latent import CHANGES
from study.systems.peer import run_path
from study.systems.registry import GENERATORS, PEERS


def costs(study: Study, request: Request, names: Iterable[str] = GENERATORS) -> pd.DataFrame:
    """One row a trained system; a nodule's figures are of the request's first, made alone, in as many steps as published
    where the system is another author's, and as the tables were made where it is not.

    Returns:
        system, parameters, updates, training_min (as logged, on whatever machine trained it), network_calls, time_s,
        peak_mb, device. An energy-guided system has the training of the network it guides.
    """
    one, rows = request[:1], []
    for name in names:
        generator = GENERATORS[name](study)
        if name in PEERS:
            generator = replace(generator, sampling=replace(generator.sampling, steps=1000))
        seen: list[int] = []
        handle = generator.unet.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = measure(lambda made_by=generator: made_by(one), repeats=1, warm_up=1)
        handle.remove()
        calls = len(seen) // 2
        updates, minutes = _training(study, name)
        size = sum(p.numel() for p in generator.unet.parameters())
        rows.append([name, size, updates, minutes, calls, found["time_s"], found["peak_mb"], device()])
    return pd.DataFrame(
        rows, columns="system parameters updates training_min network_calls time_s peak_mb device".split()
    )


def _training(study: Study, name: str) -> tuple[int, float]:
    """Updates and minutes, from the history of the run."""
    if name in PEERS:
        history = read_history(run_path(study, PEERS[name]).parent)
    else:
        history = study.unet(**CHANGES["maisi-ddpm" if name == "energy" else name])[3]
    return len(history), history.seconds.diff().clip(lower=0).sum() / 60
