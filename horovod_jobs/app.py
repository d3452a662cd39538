"""The ``horovod-jobs`` command: compose the config, then start a world or run the graph in this one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from horovod_jobs import early, sweeping
from horovod_jobs.comm.connect import GLOO_REMEDY, connect, launched_by, take_role
from horovod_jobs.comm.member import current, take_ticket
from horovod_jobs.comm.roles import Roles, check_enough
from horovod_jobs.comm.world import World
from horovod_jobs.composing import composing_error, options_first
from horovod_jobs.config import TrainStage
from horovod_jobs.early import rank_hint
from horovod_jobs.errors import ConfigError, InterruptedByUser, JobError
from horovod_jobs.instantiate import instantiate, is_node
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.job import Job, register_schema, resolve
from horovod_jobs.launch import in_rank
from horovod_jobs.launch.base import JobCommand, meant
from horovod_jobs.launch.starting import finish_sweep, start
from horovod_jobs.storage import digest_of

if TYPE_CHECKING:
    from horovod_jobs.runner import Outcome

_GOODBYE_S = 10.0
_composed = False  # Before a config is composed, only Hydra has run: its errors are about what the person typed.
_world: World | None = None  # One world a process: the jobs of a multirun share it.
_stop = StopRequest()  # The jobs of a multirun share it as well: who asks one of them to stop wants no other.
_serves = False  # This rank holds parameters for the others and runs no job.


def conf_dir() -> str:
    """Where the config groups lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def main() -> None:
    """Run the command (``__main__`` is the console script's entry point)."""
    global _stop
    _stop = StopRequest(told=in_rank.DIRECTORY_VARIABLE in os.environ)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises; the message and the exit code are ours.
    register_schema()
    in_rank.register_rank()
    sys.argv[1:] = options_first(sys.argv[1:])
    # A module of the user's beside them is found by the console script as by python -m; at the end, so that it hides nothing.
    sys.path.append(os.getcwd())
    if rank_hint() != 0:
        # --help, --cfg and warnings once, not once a rank; errors of this rank alone still go to stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        # A rank notes a signal while it loads, and all stop together when they have met; an elastic one has a driver for that.
        notes = take_ticket() is None and launched_by() != "none"
        with _stop.installed() if notes else contextlib.nullcontext(), sweeping.checked():
            hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(_task)()
        if code := finish_sweep():
            sys.exit(code)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(ConfigError(composing_error(error)))
    except JobError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(InterruptedByUser(early.said(signal.SIGINT)))
    except SystemExit:
        _flush()
        raise
    except BrokenPipeError:
        pass  # Who read the output (head, say) has had enough; _flush sends the rest nowhere.
    except BaseException as error:
        if isinstance(error, ValueError | YAMLError) and not _composed:
            _fail(ConfigError(composing_error(error)))
        traceback.print_exc()
        _fail(None, code=1, alone=True)
    _leave()


def _task(cfg: DictConfig) -> None:
    global _composed
    _composed = True
    try:
        _job(cfg)
    except JobError as error:
        _fail(sweeping.of_job(error))  # Here and not in main: Hydra would print a line of its own about any exception.


def _job(cfg: DictConfig) -> None:
    job = resolve(cfg)
    inside = launched_by() != "none"
    if job.config.launch.kind != "none" and not inside:
        check_enough(_servers(job), ranks=job.config.launch.np)
        if _servers(job) and job.config.launch.controller == "gloo":
            raise ConfigError(GLOO_REMEDY)
        code = start(job.config.launch, job=_job_command(job), elastic=_is_elastic(job))
        if code != 0:
            sweeping.tell_end(code)
            sys.exit(code)
        return
    if job.config.launch.np > 1 and not inside:
        raise ConfigError(
            f"launch.np={job.config.launch.np} asks for a world of ranks and launch=none starts none; add launch=local"
        )
    _run_here(job)


def _job_command(job: Job) -> JobCommand:
    """What the ranks of this job are to run: everything that was typed, in a world that is there already."""
    arguments = (*_config_arguments(), *meant(HydraConfig.get().overrides.task), "launch=none")
    return JobCommand(
        job.config.name,
        arguments,
        ("horovod-jobs", *meant(sys.argv[1:])),
        job.resolved,
        of_sweep=HydraConfig.get().mode == RunMode.MULTIRUN,
        outlives_ranks=_outlives_ranks(job),
    )


def _config_arguments() -> list[str]:
    """The --config-name and --config-dir this process was given, for the ranks."""
    runtime = HydraConfig.get()
    arguments = [f"--config-name={runtime.job.config_name}"]
    arguments += [
        f"--config-dir={source.path}" for source in runtime.runtime.config_sources if source.provider == "command-line"
    ]
    return arguments


def _run_here(job: Job) -> None:
    global _world
    if _serves:
        return  # The workers of an earlier job of this sweep have sent this rank home, when all their jobs were done.
    _apply_settings(job)
    if (member := current()) is not None:
        # Before the others wait for this rank, as all that takes time to load.
        import horovod_jobs.runner
        import horovod_jobs.stages.train  # noqa: F401
        from horovod_jobs.launch.elastic.rounds import run_rounds

        outcome = run_rounds(member, partial(_in_world, job))
        if outcome is None:
            _world = None  # This rank's place is gone, and its last world with it.
        _show(outcome)
        return
    if _world is None:
        roles = _role(job)
        if roles is not None and roles.is_server:
            _serve(job, roles)
            return
        _world = connect(roles, outlives_ranks=_outlives_ranks(job))
    with _stop.installed() as stop:
        _show(_in_world(job, _world, stop, lambda error: False))


def _in_world(job: Job, world: World, stop: StopRequest, goes_on: Callable[[BaseException], bool]) -> Outcome | None:
    """Collective. Run the job in this world; None for a plan. ``goes_on``: see ``Run``."""
    global _world
    _world = world
    in_rank.set_threads(world.local_size)
    from horovod_jobs.runner import Run, check_same_config

    check_same_config(job, world)
    if job.config.plan:
        _show_plan(job, world)
        return None
    give_up = partial(_fail, alone=True)
    return Run(job, world, command=_command(), stop=stop, give_up=give_up, goes_on=goes_on)()


def _show(outcome: Outcome | None) -> None:
    if outcome is not None and _rank() == 0:
        from horovod_jobs.console import result_console
        from horovod_jobs.report import summary

        shown = result_console()
        print(summary(outcome.run_dir, width=shown.width, color=shown.is_terminal))


def _apply_settings(job: Job) -> None:
    """Give Horovod the strategy's settings, which it reads when it starts."""
    node = job.config.strategy
    if not is_node(node):
        return
    wanted = instantiate(node, allow=job.config.allow_targets, where="strategy").environment()
    if _world is not None:
        late = [f"{name}={value}" for name, value in wanted.items() if os.environ.get(name) != value]
        if late:
            raise ConfigError(
                f"strategy needs {', '.join(late)}, which Horovod reads only when it starts, and this world has started; "
                "run the sweep with launch=local, which starts a world for each job"
            )
    os.environ.update(wanted)


def _servers(job: Job) -> int:
    """Ranks that the job's strategies set aside to hold parameters.

    Raises:
        ConfigError: its stages do not agree on their number.
    """
    wanted: dict[int, str] = {}
    for name, strategy in _strategies(job).items():
        wanted.setdefault(getattr(strategy, "dedicated_servers", 0), name)
    counts = sorted(set(wanted) - {0})
    if len(counts) > 1:
        said = ", ".join(f"stages.{wanted[count]}.strategy.servers={count}" for count in counts)
        raise ConfigError(f"{said}: ranks are set aside once for the whole job; use one number in all stages")
    return counts[0] if counts else 0


def _strategies(job: Job) -> dict[str, Any]:
    """The strategy of each stage that trains."""
    return {
        name: instantiate(stage.strategy, allow=job.config.allow_targets, where=f"stages.{name}.strategy")
        for name, stage in job.stages.items()
        if isinstance(stage, TrainStage) and stage.enabled and is_node(stage.strategy)
    }


def _outlives_ranks(job: Job) -> bool:
    """Whether all training of this job could go on without a rank that dies; then its world must be one that can."""
    found = [getattr(strategy, "outlives_ranks", False) for strategy in _strategies(job).values()]
    return bool(found) and all(found) and job.config.run.parallel_stages == 1


def _is_elastic(job: Job) -> bool:
    """Whether a stage trains in a world that may change."""
    return any(getattr(strategy, "elastic", False) for strategy in _strategies(job).values())


def _role(job: Job) -> Roles | None:
    """Collective over all ranks. What this rank is for."""
    alone = launched_by() == "none" and job.config.plan  # A plan needs no ranks.
    roles = take_role(servers=0 if alone else _servers(job))
    if roles is not None and roles.server_ranks:
        roles.check_same(digest_of({key: value for key, value in job.resolved.items() if key != "launch"}))
    return roles


def _serve(job: Job, roles: Roles) -> None:
    """Hold parameters until the workers send this rank home. What ends a job is theirs to decide, signals as well."""
    global _serves
    _serves = True
    in_rank.set_threads(roles.comm.Get_size())
    from horovod_jobs.pulse import SignsOfLife
    from horovod_jobs.strategy.parameter_server.server import Server
    from horovod_jobs.strategy.parameter_server.stage import Seat

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    up, down = roles.wires()
    allow = tuple(job.config.allow_targets)
    roles.unwatched()
    with SignsOfLife(roles.rank) as signs:
        seat = Seat(up, down, roles.rank, roles.worker_ranks, roles.server_ranks, allow, roles.hosts)
        Server(seat, on_run=signs.begin).serve()
    if up.lost():
        in_rank.record_exit(0)
        _flush()
        os._exit(0)  # As in _shutdown.


def _show_plan(job: Job, world: World) -> None:
    from horovod_jobs.artifacts import ArtifactStore
    from horovod_jobs.console import result_console
    from horovod_jobs.planning import plan, prepare, table
    from horovod_jobs.runner import check_place

    world.main(lambda: check_place(job), name="plan.place")
    planned = plan(job, world, ArtifactStore(job.config.run.store), prepare(job, world))
    if world.is_main:
        result_console().print(table(planned))


def _command() -> list[str]:
    """The command to reproduce this run: what the person typed, which a launching parent passes on."""
    return in_rank.original_command() or ["horovod-jobs", *sys.argv[1:]]


def _fail(error: JobError | None, *, code: int = 1, alone: bool = False) -> NoReturn:
    """Print the error once, leave no rank hanging, and exit with its code."""
    code = error.exit_code if error is not None else code
    told = in_rank.record_exit(code)
    early.over()
    if error is not None and _rank() == 0:
        # Before the others are met: the launcher ends every rank as soon as one has gone.
        print(f"error: {error}", file=sys.stderr, flush=True)
    together = not alone and not _serves and _goodbye()
    if error is not None and _rank() != 0 and not together:
        print(f"rank {_rank()}: error: {error}", file=sys.stderr)
    if (_serves or (_world is not None and _world.size > 1)) and not together:
        # The others wait in a collective this rank will never reach; the launcher ends them when this one is gone.
        sys.stderr.flush()
        os._exit(code)
    _shutdown(code)
    # A parent that knows the code needs no exit status: mpirun would add a page about it.
    sys.exit(0 if told and _world is not None else code)


def _rank() -> int:
    return _world.rank if _world is not None else rank_hint()


def _goodbye() -> bool:
    """Whether every rank came here within a few seconds: an error that all have agreed on."""
    if _world is None or _world.size == 1:
        return True
    world, arrived = _world, threading.Event()

    def meet() -> None:
        with contextlib.suppress(Exception):
            world.farewell()
            arrived.set()

    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join(_GOODBYE_S)
    return arrived.is_set()


def _leave() -> None:
    in_rank.record_exit(0)
    early.over()
    for lost in _world.lost if _world is not None else ():
        in_rank.record_lost(lost["rank"])
    _shutdown(0)


def _flush() -> None:
    """Write what is left; into a pipe that nobody reads any more it goes nowhere, without a word from Python at the end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.flush()


def _shutdown(code: int) -> None:
    _flush()
    if _world is not None:
        _world.shutdown()
    if _world is not None and _world.bereaved:
        # MPI_Finalize would wait for the dead for about twenty seconds.
        _flush()
        os._exit(code)
