"""The same job on Ray Data: actors that each hold a model, on as many GPUs and machines as the cluster has.

Ray places the actors, feeds them no more groups than they can take, and starts
one again when its process dies, with the group it had. The driver alone writes
the output, so that it is resumable and locked as ever; lines come in the order
of completion. Every machine must see the input under the same path.
"""

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import RunError, UserError
from .answers import Answerer
from .documents import Source
from .job import Job
from .progress import Watcher
from .runner import JobRun, Summary
from .stopping import StopRequest
from .worker import Outcome, Worker

# Groups of several times its places keep an actor's places filled for most of a group.
GROUPS_PLACES = 4

Load = Callable[[], Answerer]  # called once in every actor


class GroupActor:
    """One model, answering one group of documents a call.

    Rows carry pickles: Arrow has no type for documents, and Ray keeps only the
    text of what an actor raises, so that the runtime's own errors come back as
    values. For the same reason the model loads with the first call.
    """

    def __init__(self, job: Job, load: Load) -> None:
        self.job, self.load = job, load
        self.worker: Worker | None = None

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            if self.worker is None:
                self.worker = Worker(self.job, self.load(), ignore_stages)
            result: list[Outcome] | Exception = list(self.worker.work(pickle.loads(row["group"])))
        except (UserError, RunError) as error:
            result = error
        return {"result": pickle.dumps(result)}


def ignore_stages(name: str, stage: str, done: int, total: int) -> None:
    """An actor's stages stay where they are; the driver hears of finished documents."""


def run_on_ray(
    run: JobRun, load: Load, actors: int, watchers: Sequence[Watcher] = (), places: int = 1
) -> Summary:
    """Do the documents that are left on `actors` actors, one GPU each if the cluster has any.

    An actor is given as many documents at a time as it has places.

    Joins the cluster that RAY_ADDRESS names, or starts a local one. Errors as from JobRun.run.
    """
    try:
        import ray.data
    except ImportError as error:
        raise UserError("--ray-actors needs a library: pip install 'ds-offload[ray]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        size = GROUPS_PLACES if places > 1 else 1
        groups = [run.left[start : start + size * places] for start in range(0, len(run.left), size * places)]
        results = dataset(run.job, groups, load, actors, gpus)
        return run.collect(lambda stop: outcomes(results, stop), watchers)
    finally:
        if started_here:
            ray.shutdown()


def dataset(
    job: Job, documents: Sequence[Sequence[Source]], load: Load, actors: int, gpus_per_actor: int
) -> Any:
    """Ray's lazy dataset of the groups' outcomes; one block a group, so that each comes out when done."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    actor: Any = GroupActor  # a class is right here; Ray's types ask for a function
    groups = [{"group": pickle.dumps(group)} for group in documents]
    return ray.data.from_items(groups, override_num_blocks=len(groups)).map(
        actor,
        fn_constructor_args=(job, load),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(groups))),
        num_gpus=gpus_per_actor,
    )


def outcomes(results: Any, stop: StopRequest) -> Iterator[list[Outcome]]:
    """The groups' outcomes as they come, until `stop` is asked for.

    Raises an actor's error, or RunError for what befell Ray.
    """
    from ray.exceptions import RayError

    try:
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Exception):
                raise result
            yield result
            if stop.asked:
                return
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]  # a stack, then what happened
        raise RunError(f"Ray ended the job: {lines[-1].strip() if lines else error!r}") from error
