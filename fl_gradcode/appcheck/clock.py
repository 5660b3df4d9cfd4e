"""Another clock for a process: what Python code reads of the time of day, and if asked of elapsed time."""

from __future__ import annotations

import datetime
import sys
import sysconfig
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["set_clock", "set_dates"]

_SPANS = ("monotonic", "perf_counter", "process_time", "thread_time")


def set_clock(now: Callable[[], float], *, spans: bool = False) -> None:
    """Replace the clock of this process, before the app is imported. For a process that ends soon.

    Args:
        now: Returns the time, in seconds since the epoch.
        spans: Whether elapsed time, such as `time.perf_counter`, is replaced too.
    """
    before: Any = {name: getattr(time, name) for name in ("localtime", "gmtime", "strftime", "ctime", "asctime")}
    moments: Any = time
    moments.time = now
    moments.time_ns = lambda: int(now() * 1e9)
    moments.localtime = lambda seconds=None: before["localtime"](now() if seconds is None else seconds)
    moments.gmtime = lambda seconds=None: before["gmtime"](now() if seconds is None else seconds)
    moments.ctime = lambda seconds=None: before["ctime"](now() if seconds is None else seconds)
    moments.asctime = lambda moment=None: before["asctime"](moments.localtime() if moment is None else moment)
    moments.strftime = lambda form, moment=None: before["strftime"](
        form, moments.localtime() if moment is None else moment
    )
    if spans:
        for name in _SPANS:
            setattr(moments, name, now)
            setattr(moments, f"{name}_ns", moments.time_ns)


def set_dates(now: Callable[[], float]) -> None:
    """Replace `datetime.date` and `datetime.datetime` in the modules that the app consists of, once it is imported.

    Compiled packages rely on the classes as they are, so installed modules keep them.

    Args:
        now: Returns the time, in seconds since the epoch.
    """

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls.fromtimestamp(now())

    class DateTime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(now(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.fromtimestamp(now(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.fromtimestamp(now())

    whole: Any = ModuleType("datetime")
    vars(whole).update({**vars(datetime), "date": Date, "datetime": DateTime})
    others = {id(datetime): whole, id(datetime.date): Date, id(datetime.datetime): DateTime}
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path is None or path.startswith(installed) or module.__name__ == __name__:
            continue
        for name, value in list(vars(module).items()):
            if id(value) in others:
                setattr(module, name, others[id(value)])
