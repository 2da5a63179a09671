"""What to set for one's own checkpoint: Optuna tries settings, and the pictures and scores stay in the store."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hosting.errors import HostError

from neggen.pairs import Pair
from neggen.report import SCORES, Mean, Results
from neggen.store import Store, Unkept
from neggen.templates import Run, Settings, Template, label, slots_of
from neggen.words import plain

STEP = 0.05
BASE = "none"
"""The method that a setting is held against."""


@dataclass(frozen=True)
class Search:
    """One question: which setting within ``ranges`` removes most, of those that keep enough of what no negative gives.

    keep_positive, keep_quality: the shares of the scores without a negative that have to stay.
    """

    template: Template
    method: str
    fixed: Settings
    ranges: Mapping[str, tuple[float, float]]
    pairs: Sequence[Pair]
    seeds: Sequence[int]
    judge: str
    keep_positive: float = 0.90
    keep_quality: float = 0.95

    @property
    def name(self) -> str:
        """The same question has the same name, so that it goes on where it was."""
        told = [self.template.name, self.method, self.fixed, dict(self.ranges), [pair.id for pair in self.pairs]]
        told += [list(self.seeds), self.judge, self.keep_positive, self.keep_quality]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def run(self, numbers: Mapping[str, float]) -> Run:
        """The run that a trial's numbers stand for."""
        settings = {**self.fixed, **{name: round(value, 4) for name, value in numbers.items()}}
        return Run(label(self.method, settings), self.method, settings)

    def base(self) -> Run:
        """The run without a negative, with those of the fixed settings that it knows."""
        known = slots_of(self.template.methods.get(BASE, {}))
        settings = {name: value for name, value in self.fixed.items() if name in known}
        return Run(label(BASE, settings), BASE, settings)


def search(store: Store, asked: Search, trials: int, measure: Callable[[], None]) -> dict[str, Any]:
    """Tries settings until ``trials`` are done, those of earlier processes included; gives the recommended one.

    measure: draws and judges what the store lacks. The answer: settings, scores with intervals, those without a
    negative, and whether the setting keeps what it has to; it goes to recommended.json too.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for run in (asked.base(), asked.run({name: ends[0] for name, ends in asked.ranges.items()})):
        asked.template.check(run)  # before anything is drawn
    study = _study(store, asked.name)
    base = _scores(store, asked, asked.base(), measure)
    for broken in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.enqueue_trial(broken.params)
        study.tell(broken.number, state=optuna.trial.TrialState.FAIL)
    space = {name: optuna.distributions.FloatDistribution(*ends, step=STEP) for name, ends in asked.ranges.items()}
    while (done := _done(study)) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        trial = study.ask(space)
        scores = _scores(store, asked, asked.run(trial.params), measure)
        for name, lack in _lacks(asked, scores, base).items():
            trial.set_constraint(name, lack)
        study.tell(trial, scores["negative"].value)
        told = ", ".join(f"{name} {scores[name].value:.3f}" for name in SCORES)
        print(f"trial {done + 1} of {trials}: {asked.run(trial.params).name}: {told}", flush=True)
    return _recommended(store, asked, study, base)


def _study(store: Store, name: str) -> Any:
    """What was tried before, or nothing yet."""
    import optuna
    import sqlalchemy.exc

    path = store.folder / "search.sqlite"
    try:
        storage = f"sqlite:///{path}"
        return optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="maximize")
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise Unkept(f"{path} can't be used ({plain(error, 200)}): put it away, or give another --out") from None


def parse_ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """``NAME=LOW:HIGH`` each."""
    ranges = {}
    for text in texts:
        key, _, ends = text.partition("=")
        try:
            low, high = (float(end) for end in ends.split(":"))
        except ValueError:
            low = high = math.nan
        if not (key and math.isfinite(low) and math.isfinite(high) and low < high):
            raise HostError(f"--range {plain(text)}: expected NAME=LOW:HIGH, such as scale=0:8")
        ranges[key] = (low, high)
    return ranges


def _done(study: Any) -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.trials)


def _scores(store: Store, asked: Search, run: Run, measure: Callable[[], None]) -> dict[str, Mean]:
    """A run's scores by the search's judge, once they are complete."""
    store.plan(asked.template, [asked.template.check(run)], asked.pairs, asked.seeds)
    measure()
    (row,) = (row for row in Results(store).tables.get(asked.judge, ()) if row.run == run)
    scores = {name: mean for name, mean in row.scores.items() if mean is not None}
    if len(scores) < len(SCORES) or row.pictures < len(asked.pairs) * len(asked.seeds):
        raise HostError(f"{run.name}: not all pictures were drawn and judged; run the same command again to go on")
    return scores


def _lacks(asked: Search, scores: Mapping[str, Mean], base: Mapping[str, Mean]) -> dict[str, float]:
    """How much of what has to stay is gone; nothing above 0 is fine."""
    least = {"positive": asked.keep_positive, "quality": asked.keep_quality}
    return {name: share * base[name].value - scores[name].value for name, share in least.items()}


def _recommended(store: Store, asked: Search, study: Any, base: Mapping[str, Mean]) -> dict[str, Any]:
    tables = {row.run.name: row for row in Results(store).tables[asked.judge]}
    rows = [tables[asked.run(trial.params).name] for trial in study.trials if trial.state.name == "COMPLETE"]

    def rank(row: Any) -> tuple[bool, float, float]:
        worst = max(0.0, *_lacks(asked, row.scores, base).values())
        return (worst == 0, row.scores["negative"].value if worst == 0 else -worst, row.scores["quality"].value)

    best = max(rows, key=rank)
    answer = {
        "method": best.run.method,
        "settings": best.run.settings,
        "keeps_enough": rank(best)[0],
        "scores": {name: [best.scores[name].value, best.scores[name].low, best.scores[name].high] for name in SCORES},
        "without_negative": {name: base[name].value for name in SCORES},
        "trials": len(rows),
        "judge": asked.judge,
    }
    (store.folder / "recommended.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    return answer
