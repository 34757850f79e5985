"""The only place that knows Dask: map one function over task names, on whatever cluster."""

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from curate import __version__, storage
from curate.errors import ConfigError, CurateError, WorkerError

__all__ = ["ClusterOptions", "Workers", "count_cores", "count_gpus", "keep_freed_memory"]

#: The name of a task, or of several that are done together.
_Task = TypeVar("_Task", str, tuple[str, ...])

#: Tasks handed to the scheduler ahead of the workers, per worker: enough to keep them busy, few
#: enough that a run of a million tasks does not live in the scheduler.
_AHEAD = 4

#: Where local workers put their own files; the process that started them is part of the name.
_SCRATCH = "curate-dask-"

#: glibc's mallopt: parameters (malloc.h) and bytes. Tensors up to the first size, glibc's limit,
#: come from memory that the process keeps, of which it returns what exceeds the second.
_MALLOC = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 256 << 20)}

#: What every worker imports.
_IMPORTED = ("distributed", "curate.stages")

_CLUSTERS = {
    "local": ("distributed", "LocalCluster"),
    "local-cuda": ("dask_cuda", "LocalCUDACluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}


@dataclass(frozen=True)
class ClusterOptions:
    """Where tasks run; never part of a fingerprint.

    Parameters
    ----------
    workers : int, optional
        Worker processes of the local cluster; default: one per GPU, else one per core.
    scheduler : str, optional
        Address of a running Dask scheduler to use instead.
    cluster : dict, optional
        `kind` (local, local-cuda, slurm, kubernetes), `workers`, and that class's arguments.
    """

    workers: int | None = None
    scheduler: str | None = None
    cluster: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        kind = None if self.cluster is None else self.cluster.get("kind")
        if self.cluster is not None and kind not in _CLUSTERS:
            raise ConfigError(
                f"--cluster: kind must be one of {', '.join(_CLUSTERS)}; got {kind!r}. Set it."
            )


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """Return the NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    devices = Path("/proc/driver/nvidia/gpus")
    return len(list(devices.iterdir())) if devices.is_dir() else 0


class Workers:
    """A Dask client that is started by the first map and closed with the block.

    Parameters
    ----------
    options : ClusterOptions
    out : str
        OUT, which every worker must be able to see.
    imports : sequence of str
        Modules that tasks need and that take seconds to import: local workers share one import.
    """

    def __init__(self, options: ClusterOptions, out: str, imports: Sequence[str] = ()) -> None:
        self._options = options
        self._out = out
        self._imports = imports
        self._stack = contextlib.ExitStack()
        self._client: Any = None
        #: Our own, which grows.
        self._cluster: Any = None
        self._gpus = 0
        self.count = 0
        self.threads = 1
        self.have_gpus = False

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._client = self._cluster = None

    def map(
        self, function: Callable[..., Any], tasks: Sequence[_Task], *arguments: Any
    ) -> Iterator[tuple[_Task, Any]]:
        """Yield (task, `function(*arguments, task)`) as tasks end, in any order.

        A task is a name, or several names of what is done together.

        Raises
        ------
        CurateError
            Whatever a task raised, or WorkerError if workers kept dying under it.
        """
        self.start(len(tasks))
        client = self._client
        from distributed import as_completed

        waiting = iter(tasks)
        running = as_completed(loop=client.loop, with_results=False, raise_errors=False)
        names: dict[str, _Task] = {}

        def submit_next() -> None:
            task = next(waiting, None)
            if task is None:
                return
            call = (self._gpus, function, *arguments, task)
            future = client.submit(_in_worker, *call, pure=False, retries=0)
            names[future.key] = task
            running.add(future)

        for _ in range(max(1, self.count) * _AHEAD):
            submit_next()
        for future in running:
            task = names.pop(future.key)
            result = _result(future, task)
            submit_next()
            yield task, result

    def warm(self, load: Callable[..., None], *arguments: Any) -> None:
        """Call `load` in the background of every worker, while it works on other tasks."""
        self.start()
        if self._gpus > 1:  # the first task decides which one a worker sees
            return
        if self._cluster is None:  # a plug-in would outlive this run
            self._client.run(_in_background, load, *arguments)
        else:
            from curate.engine.each_worker import EachWorker

            self._client.register_plugin(EachWorker(_in_background, load, *arguments))

    def everywhere(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function once in every worker that is alive."""
        if self._client is not None:
            self._client.run(function, *arguments, on_error="ignore")

    def start(self, tasks: int = 1) -> None:
        """Start or reach the cluster, with as many local workers as tasks can employ."""
        if self._client is None:
            if self._options.scheduler is not None:
                self._client = self._connect(self._options.scheduler)
            elif self._options.cluster is not None:
                self._client = self._launch(dict(self._options.cluster))
            else:
                self._client = self._local(tasks)
        elif self._cluster is not None and len(self._cluster.worker_spec) < self._employed(tasks):
            # Each costs seconds of imports and memory. They come up while others work.
            self._cluster.scale(self._employed(tasks))

    def _employed(self, tasks: int) -> int:
        return max(1, min(tasks, self.count))

    def describe_dashboard(self) -> str:
        """Return the address of Dask's dashboard, or why there is none, as a sentence."""
        if find_spec("bokeh") is None:
            return "Dask dashboard: off, bokeh is not installed; pip install 'curate[dashboard]'"
        self.start()
        try:
            return f"Dask dashboard: {self._client.dashboard_link}"
        except KeyError:  # a scheduler that runs without
            return "Dask dashboard: off, the scheduler has none"

    def planned(self) -> int:
        """Return how many tasks run at once; elsewhere what the cluster's file asks for, or 1."""
        if self._client is not None:
            return max(1, self.count)
        if self._options.scheduler or self._options.cluster:
            return int((self._options.cluster or {}).get("workers") or 1)
        return _count_local(self._options)

    def _local(self, tasks: int) -> Any:
        import dask
        from distributed import Client, LocalCluster

        from curate.engine.each_worker import EachWorker

        cores, gpus = count_cores(), count_gpus()
        self.count = _count_local(self._options)
        self.threads = max(1, cores // self.count)
        self._gpus = gpus
        self.have_gpus = gpus > 0
        _clear_scratch()
        scratch = tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-")
        self._stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        # A task's exception is raised here: workers need not print it, traceback and all, before.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        threads = _thread_environment(self.threads)
        with _interrupts_held(), _starting_told():
            # A fork cannot use a CUDA that was in use before, nor do a Mac's libraries bear one.
            may_fork = gpus == 0 and sys.platform == "linux"
            forks = may_fork and _import_once((*_IMPORTED, *self._imports), threads)
            settings = {
                "distributed.nanny.pre-spawn-environ": threads,
                "distributed.worker.multiprocessing-method": "forkserver" if forks else "spawn",
            }
            self._stack.enter_context(dask.config.set(settings))
            cluster = LocalCluster(
                n_workers=self._employed(tasks),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # any free port: several runs share a machine
                local_directory=scratch,
                memory_limit=0,  # tasks keep nothing in Dask; pausing workers would only stall them
                silence_logs=logging.CRITICAL,
            )
            self._cluster = self._stack.enter_context(cluster)
        client = self._stack.enter_context(Client(cluster, set_as_default=False))
        if forks:  # from a process which may be of an earlier run, and has the environment of it
            client.register_plugin(EachWorker(_take_environment, dict(os.environ)))
        return client

    def _launch(self, description: dict[str, Any]) -> Any:
        from importlib import import_module

        from distributed import Client

        kind = description.pop("kind")
        module, name = _CLUSTERS[kind]
        workers = description.pop("workers", None)
        if kind == "local":
            description.setdefault("silence_logs", logging.CRITICAL)
        try:
            with _interrupts_held():
                cluster = getattr(import_module(module), name)(**description)
                self._stack.enter_context(cluster)
        except ImportError as error:
            package = module.split(".")[0].replace("_", "-")
            raise ConfigError(
                f"--cluster: kind {kind} needs the package {package}; it is not installed. "
                f"Run pip install {package}."
            ) from error
        except (TypeError, ValueError, RuntimeError) as error:
            # What a worker process choked on is the cause of "Nanny failed to start".
            why = str(error.__cause__ or error).partition("\n")[0]
            raise ConfigError(
                f"--cluster: {name} refused its arguments: {why}. Correct them."
            ) from error
        if workers is not None:
            cluster.scale(int(workers))
        client = self._stack.enter_context(Client(cluster, set_as_default=False))
        client.wait_for_workers(1, timeout=600)
        self._check(client)
        return client

    def _connect(self, address: str) -> Any:
        from distributed import Client
        from distributed.comm.addressing import get_address_host

        try:
            get_address_host(address)  # a client of a malformed address cannot even be closed
            client = Client(address, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            raise WorkerError(
                f"--scheduler {address}: must be a running Dask scheduler; none answered. "
                "Start one with `dask scheduler`, or leave the option out."
            ) from error
        self._stack.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=30)
        except TimeoutError as error:
            raise WorkerError(
                f"--scheduler {address}: must have workers; none came within 30 s. "
                "Start some with `dask worker`."
            ) from error
        self._check(client)
        return client

    def _check(self, client: Any) -> None:
        """Refuse workers that do not see OUT or run other versions than this process."""
        from curate.engine.manifest import provenance

        self.count = len(client.scheduler_info(n_workers=-1)["workers"])
        here = {"curate": __version__, **provenance()}
        probe = storage.join(self._out, f"{storage.TEMPORARY_PREFIX}probe")
        storage.commit_bytes(probe, b"seen")
        try:
            answers = client.run(_describe_worker, probe)
        except ImportError as error:
            raise WorkerError(
                f"workers: must have curate {__version__} installed; {error}. Install it there."
            ) from error
        finally:
            storage.remove(probe)
        self.have_gpus = any(gpus for _, _, gpus in answers.values())
        for worker, (sees, versions, _) in answers.items():
            if not sees:
                raise WorkerError(
                    f"worker {worker}: must see {self._out}; it does not. Use a shared folder "
                    "or an object store as --output."
                )
            for package, version in here.items():
                if versions.get(package) != version:
                    raise WorkerError(
                        f"worker {worker}: must have {package} {version}; it has "
                        f"{versions.get(package, 'none')}. Install the same versions there."
                    )


def _count_local(options: ClusterOptions) -> int:
    cores, gpus = count_cores(), count_gpus()
    # More workers than cores would only share them, and load every model once more.
    return min(options.workers or gpus or cores, max(gpus, cores))


def _take_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _in_background(load: Callable[..., None], *arguments: Any) -> None:
    keep_freed_memory()
    # A daemon: whatever goes wrong here goes wrong again, and is told, in the task that needs it.
    threading.Thread(target=_unheard, args=(load, *arguments), daemon=True).start()


def _unheard(load: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(Exception):
        load(*arguments)


@contextlib.contextmanager
def _starting_told() -> Iterator[None]:
    """Say why local workers did not come up, as far as that can be known."""
    try:
        yield
    except RuntimeError as error:  # "Nanny failed to start"
        why = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise WorkerError(
            f"workers: must start; they did not: {why}. A script must call curate.run under "
            '`if __name__ == "__main__":`, since workers import it; elsewhere use fewer --workers.'
        ) from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C from threads and processes started here: this one stops them in good order."""
    # It must run before: when it starts it lets interrupts through again in the calling thread.
    resource_tracker.ensure_running()
    waiting: list[int] = []
    # The mask is for what is started here. A thread that was there before takes the signal, and
    # Python would break off this one halfway through its start.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_main = threading.current_thread() is threading.main_thread()
    held = {number: one for number, one in handlers.items() if is_main and callable(one)}
    for number in held:
        signal.signal(number, lambda came, _: waiting.append(came))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if waiting:
            signal.raise_signal(waiting[0])


def _in_worker(gpus: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker process, once that is set up."""
    keep_freed_memory()
    _see_own_gpu(gpus)
    try:
        return function(*arguments)
    finally:
        _return_freed_memory()


@cache  # once per process
def keep_freed_memory() -> None:
    """Let malloc reuse the memory of tensors instead of returning it after each.

    Fetching it anew, page by page, takes a third of a forward pass's time, and two thirds with the
    MALLOC_TRIM_THRESHOLD_ that Dask gives its workers.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


def _return_freed_memory() -> None:
    """Give what a task left to the system, or the next adds its own to it.

    Once a task this costs nothing that can be measured; a step over all samples leaves a gigabyte.
    """
    from pyarrow import default_memory_pool

    default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _see_own_gpu(gpus: int) -> None:
    """Show a local worker one GPU, by its number among the workers."""
    if gpus > 1 and "CURATE_GPU" not in os.environ:
        from distributed import get_worker

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        # Read by CUDA when torch first uses it, which is after this.
        chosen = visible.split(",")[int(get_worker().name) % gpus]
        os.environ.update({"CUDA_VISIBLE_DEVICES": chosen, "CURATE_GPU": chosen})


def _clear_scratch() -> None:
    """Remove what the workers of killed runs left in the folder for temporary files."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        owner = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _describe_worker(probe: str) -> tuple[bool, dict[str, str], int]:
    from curate.engine.manifest import provenance

    return storage.exists(probe), provenance(), count_gpus()


def _thread_environment(threads: int) -> dict[str, str]:
    # Set before the workers import numpy or torch: their pools read these once.
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def _import_once(modules: Sequence[str], environment: dict[str, str]) -> bool:
    """Start the process that local workers are forked from, unless an earlier run did.

    Two workers that import torch and a tower's library each take twice the time of a small run.

    Returns
    -------
    bool
        Whether there is one: a TMPDIR may be too long for its socket.
    """
    os.environ.update(environment)  # as Dask does before it starts a worker
    before = dict(os.environ)
    # It would look into the current folder first, where another `curate` may lie.
    paths = os.pathsep.join(str(path or os.getcwd()) for path in sys.path)
    os.environ.update(PYTHONPATH=paths, PYTHONSAFEPATH="1")
    try:
        forkserver.set_forkserver_preload(list(modules))
        forkserver.ensure_running()
    except OSError:
        return False
    finally:
        _take_environment(before)
    return True


def _result(future: Any, task: str | tuple[str, ...]) -> Any:
    from distributed.scheduler import KilledWorker

    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, CurateError):
        raise error
    if isinstance(error, KilledWorker):
        name = task if isinstance(task, str) else " ".join(task)
        raise WorkerError(
            f"task {name}: must not exhaust its worker; the worker died {error.allowed_failures} "
            "times (out of memory?). Use fewer --workers, then run again to resume."
        ) from error
    raise error
