"""A study of Optuna's in a database: read once, then one transaction for each step, tried again while it is away.

Optuna's own tools open it: weights are parameters, fitness is the value, everything else is user attributes.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import delete, insert, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from engine.objective.terms import TERM_NAMES
from engine.samplers import MemberRecord, Proposal, State
from engine.samplers_optuna import SPACE, STATES
from engine.study_storage_outage import Patience

BUSY_SECONDS = 5.0
"""How long one try waits for another process that holds the SQLite file."""

LINEAGE = ("parent", "mutated", "round")
"""User attributes that are fields of a Proposal."""

NAMES: dict[TrialState, State] = {state: name for name, state in STATES.items()}


class StudyStorage:
    """The study ``name`` at a place: a Path is an SQLite file, a string any storage URL of Optuna's.

    A call that meets a database that is away (locked, restarted, not to be reached) tells ``on_wait`` why, once, and
    tries again after growing pauses, for up to ``patience`` seconds. A write whose answer was lost may have been done:
    a later try finds it, compares, and does nothing twice.

    Raises ValueError for a URL that names no database or one whose driver is absent; and, as every method does, OSError
    where the database can't be read or written, with ``errno.ENOSPC`` where its disk is full, which is not waited for.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        name: str,
        patience: float,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.where = re.sub("://[^/]*@", "://", str(place))  # without a password
        try:
            url = _url(place)
        except ArgumentError as error:
            raise ValueError(f"{self.where}: not the address of a database: {error}") from None
        file = url.database if url.get_backend_name() == "sqlite" else None
        self._patiently = Patience(self.where, file=file, seconds=patience, on_wait=on_wait)
        try:
            self._storage = self._patiently(lambda: _connect(url))
            self._study = self._patiently(lambda: _study_id(self._storage, name))
        except ImportError as error:
            raise ValueError(
                f"{self.where}: its driver is not installed ({error.__cause__ or error}); for PostgreSQL"
                " install the extra postgres, and write postgresql+psycopg://"
            ) from None
        self.name, self._patiently.opening = name, False
        self._ids: dict[int, int] = {}
        """Optuna's id of each trial, by number."""

    def load(self, recipe_hash: str) -> list[Proposal]:
        """All trials by number, those that are done as MemberRecord.

        Raises ValueError where the study belongs to another recipe.
        """
        storage, study = self._storage, self._study
        trials = self._patiently(lambda: storage.get_all_trials(study, deepcopy=False))
        found = self._patiently(lambda: storage.get_study_user_attrs(study)).get("recipe_hash")
        if found is None and not trials:  # new, or killed before the next line
            self._patiently(lambda: storage.set_study_user_attr(study, "recipe_hash", recipe_hash))
        elif found != recipe_hash:
            raise ValueError(
                f"{self.where}: study {self.name!r} belongs to recipe {found}, not to"
                f" {recipe_hash}: resume it with its own recipe, or start a new run"
            )
        trials.sort(key=lambda trial: trial.number)
        self._ids = {trial.number: trial._trial_id for trial in trials}
        return [_proposal(trial) for trial in trials]

    def add(self, proposals: Sequence[Proposal]) -> None:
        """Store running trials, all or none; raises RuntimeError where others have these numbers."""
        self._ids.update(self._patiently(lambda: self._add(proposals)))

    def finish(self, member: MemberRecord) -> None:
        """Store what became of a trial; raises ValueError where another process did."""
        self._patiently(lambda: self._finish(member))

    def _add(self, proposals: Sequence[Proposal]) -> dict[int, int]:
        trials: Any = models.TrialModel
        with Session(self._storage.engine) as session, session.begin():
            # Whoever adds trials holds the study's row, also one whose answer was lost.
            models.StudyModel.find_or_raise_by_id(self._study, session, for_update=True)
            query = select(trials.number, trials.trial_id).where(
                trials.study_id == self._study, trials.number >= proposals[0].trial
            )
            there: dict[int, int] = {row[0]: row[1] for row in session.execute(query)}
            if there:
                same = sorted(there) == [proposal.trial for proposal in proposals]
                if (
                    self._patiently.unsure
                    and same
                    and all(_weights(session, there[p.trial]) == p.weights for p in proposals)
                ):
                    return there
                raise RuntimeError(f"{self.where}: another process proposes members in this study")
            rows = [
                trials(
                    study_id=self._study,
                    number=proposal.trial,
                    state=TrialState.RUNNING,
                    datetime_start=datetime.now(),
                )
                for proposal in proposals
            ]
            session.add_all(rows)
            session.flush()
            ids: dict[int, int] = {row.number: row.trial_id for row in rows}
            _insert(session, models.TrialParamModel, [
                {
                    "trial_id": ids[proposal.trial],
                    "param_name": name,
                    "param_value": proposal.weights[name],
                    "distribution_json": distribution_to_json(SPACE[name]),
                }
                for proposal in proposals for name in TERM_NAMES
            ])  # fmt: skip
            for proposal in proposals:
                lineage = {key: getattr(proposal, key) for key in LINEAGE}
                _insert_attributes(
                    session, models.TrialUserAttributeModel, ids[proposal.trial], lineage
                )
                _insert_attributes(
                    session, models.TrialSystemAttributeModel, ids[proposal.trial], proposal.notes
                )
            return ids

    def _finish(self, member: MemberRecord) -> None:
        trial_id = self._ids[member.trial]
        with Session(self._storage.engine) as session, session.begin():
            trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            if trial.state.is_finished():
                there = _proposal(self._storage._build_frozen_trial_from_trial_model(trial))
                if not (self._patiently.unsure and _same(there, member)):
                    raise ValueError(f"{self.where}: trial {member.trial} is done already")
                return
            values, steps = models.TrialValueModel, models.TrialIntermediateValueModel
            if member.fitness is not None:
                value, kind = values.value_to_stored_repr(member.fitness)
                row = {"trial_id": trial_id, "objective": 0, "value": value, "value_type": kind}
                _insert(session, values, [row])
            reached = [(s, steps.intermediate_value_to_stored_repr(v)) for s, v in member.rungs]
            _insert(session, steps, [
                {"trial_id": trial_id, "step": s, "intermediate_value": v, "intermediate_value_type": k}
                for s, (v, k) in reached
            ])  # fmt: skip
            if member.attributes:
                attributes = models.TrialUserAttributeModel
                session.execute(
                    # What Optuna's dashboard or another tool noted under the same names goes.
                    delete(attributes).where(
                        attributes.trial_id == trial_id, attributes.key.in_(member.attributes)
                    )
                )
                _insert_attributes(session, attributes, trial_id, member.attributes)
            trial.state = STATES[member.state]
            trial.datetime_complete = datetime.now()


def _url(place: str | Path) -> URL:
    if isinstance(place, Path):
        return URL.create("sqlite", database=str(place.absolute()))
    url = make_url(place)
    url.get_dialect()  # raises for a name that is none
    return url


def _connect(url: URL) -> RDBStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}  # connections idle for hours may be gone
    if url.get_backend_name() == "sqlite":
        _make_file(url.database)
        options = {"connect_args": {"timeout": BUSY_SECONDS}}
    elif url.get_backend_name() == "postgresql" and url.get_driver_name().startswith("psycopg"):
        # Without these, a server that vanished from the network is waited for two hours.
        options["connect_args"] = {
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        }
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)


def _make_file(file: str | None) -> None:
    """Make a new SQLite file with all of Optuna's tables, or none: a kill would leave some without their indices.

    With a write-ahead log: one wait for the disk a write instead of four, and no wait for readers. Where the file
    system can't share the log's memory map (some of a network's), the file keeps SQLite's default.
    """
    path = Path(file or ":memory:")
    if file in (None, "", ":memory:") or path.exists() or not path.parent.is_dir():
        return
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    for leftover in path.parent.glob(f".{path.name}.*.new*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    with suppress(sqlite3.Error), closing(sqlite3.connect(new)) as plain:
        plain.execute("PRAGMA journal_mode = WAL").fetchall()
    engine = RDBStorage(URL.create("sqlite", database=str(new)).render_as_string()).engine
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    engine.dispose()
    try:
        os.link(new, path)
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # a file system without links
        os.replace(new, path)
    for leftover in path.parent.glob(f"{new.name}*"):
        leftover.unlink(missing_ok=True)


def _study_id(storage: RDBStorage, name: str) -> int:
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )
    return storage.get_study_id_from_name(study.study_name)


def _insert(session: Session, model: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        session.execute(insert(model), rows)


def _insert_attributes(
    session: Session, model: Any, trial_id: int, values: Mapping[str, Any]
) -> None:
    _insert(session, model, [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in values.items()
    ])  # fmt: skip


def _weights(session: Session, trial_id: int) -> dict[str, float]:
    rows: Any = models.TrialParamModel
    query = select(rows.param_name, rows.param_value).where(rows.trial_id == trial_id)
    return {row[0]: row[1] for row in session.execute(query)}


def _proposal(trial: FrozenTrial) -> Proposal:
    """What a trial of the database is; a MemberRecord if it is done."""
    attributes = dict(trial.user_attrs)
    lineage = {key: attributes.pop(key, None) for key in LINEAGE}
    weights = {name: float(trial.params[name]) for name in TERM_NAMES}
    if not trial.state.is_finished():
        return Proposal(trial.number, weights, **lineage, notes=trial.system_attrs)
    rungs = tuple(sorted(trial.intermediate_values.items()))
    return MemberRecord(
        trial.number,
        weights,
        **lineage,
        state=NAMES[trial.state],
        fitness=trial.value if trial.state == TrialState.COMPLETE else None,
        attributes=attributes,
        partial=rungs[-1][1] if rungs else None,
        rungs=rungs,
        notes=trial.system_attrs,
    )


def _same(one: Proposal, other: Proposal) -> bool:
    """As text, since NaN differs from itself."""
    return json.dumps(asdict(one), sort_keys=True) == json.dumps(asdict(other), sort_keys=True)
