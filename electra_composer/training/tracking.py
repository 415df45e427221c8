"""Composer's loggers of experiment trackers: Weights & Biases, MLflow, Comet; Neptune's needs no change.

Nothing is written or sent before training starts: MLFlowLogger and CometMLLogger create their experiment when they are
built, as `--check` also does, so their construction is put off to the trainer's first event.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

from composer.core import State
from composer.loggers import CometMLLogger, Logger, MLFlowLogger, NeptuneLogger, WandBLogger
from composer.utils import MissingConditionalImportError

from electra_composer.errors import UserError, one_line

# Name of a logger whose package is an extra of the same name → that package.
PACKAGES = {"comet": "comet_ml", "mlflow": "mlflow", "neptune": "neptune", "wandb": "wandb"}


def require(name: str) -> None:
    """Refuse a logger whose package is not installed, as Composer's loggers do.

    Raises:
        MissingConditionalImportError: it is not.
    """
    try:
        found = importlib.util.find_spec(PACKAGES[name]) is not None
    except ValueError:  # a module that is None in sys.modules
        found = False
    if not found:
        raise MissingConditionalImportError(name, PACKAGES[name])


class RunWandB(WandBLogger):
    """WandBLogger that works with versions of wandb without `Run.get_url`."""

    def init(self, state: State, logger: Logger) -> None:
        import wandb

        # Workaround (composer 0.32): calls `Run.get_url`, which wandb has removed (0.31 lacks it) in favour of the
        # property `url`; goes when WandBLogger reads `url`.
        if not hasattr(wandb.Run, "get_url"):
            wandb.Run.get_url = lambda run: run.url
        super().init(state, logger)


class RunNeptune(NeptuneLogger):
    """NeptuneLogger; its run begins when training starts."""

    @functools.wraps(NeptuneLogger.__init__)  # type: ignore[misc]  # the YAML is checked against its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require("neptune")
        super().__init__(*args, **kwargs)


class RunMLflow(MLFlowLogger):
    """MLFlowLogger that creates its experiment when training starts."""

    @functools.wraps(MLFlowLogger.__init__)  # type: ignore[misc]  # the YAML is checked against its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require("mlflow")
        self._start = functools.partial(super().__init__, *args, **kwargs)

    def init(self, state: State, logger: Logger) -> None:
        self._start()
        super().init(state, logger)


class RunComet(CometMLLogger):
    """CometMLLogger that creates its experiment when training starts, offline with `exp_kwargs.offline_directory`.

    Comet logs only what this logger gives it, and not again what it finds in other libraries, such as MLflow beside it.
    """

    @functools.wraps(CometMLLogger.__init__)  # type: ignore[misc]  # the YAML is checked against its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require("comet")
        self._start = functools.partial(super().__init__, *args, **kwargs)
        self._offline = "offline_directory" in (kwargs.get("exp_kwargs") or {})

    def init(self, state: State, logger: Logger) -> None:
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # read when it is imported
        import comet_ml

        # Workaround (composer 0.32): CometMLLogger takes the class Experiment, which needs a network, whatever its
        # arguments; goes when it has an argument for offline experiments.
        online = comet_ml.Experiment
        try:
            if self._offline:
                comet_ml.Experiment = comet_ml.OfflineExperiment
            self._start()
        except ValueError as error:  # of Comet: no key, or an argument that it does not have
            hint = "set COMET_API_KEY, or loggers.comet.exp_kwargs.offline_directory to keep the logs in a folder"
            raise UserError(f"loggers.comet: {one_line(error, 200)}; {hint}") from error
        finally:
            comet_ml.Experiment = online
        super().init(state, logger)
