"""`nemo-star harness`: tasks of lm-evaluation-harness, run on rank 0, answered by all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.config.harness import HarnessConfig
from nemo_star.evaluation.harness.model import NemoStar
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import on_first_rank


def run(config: HarnessConfig) -> int:
    """Run the tasks, print their table, write results where there is an output.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    return _Harness(config).run()


class _Harness:
    def __init__(self, config: HarnessConfig) -> None:
        self._config = config
        self._manager: TaskManager | None = None
        self._tasks: list[str] = []

    def run(self) -> int:
        config = self._config
        with OpenedModel.opened(config) as llm:
            llm.max_batch_size = config.max_batch_size
            with llm.watchdog.suspended("reading tasks"):
                on_first_rank(self._find_tasks)
            llm.load_weights()
            lm = NemoStar(llm, query=config.query, max_length=config.max_length, add_bos_token=config.add_bos_token)
            lm.lead(lambda: self._evaluate(lm))
        return 0

    def _find_tasks(self) -> None:
        """On rank 0, before the weights are loaded: all that is asked for by a name that exists."""
        config = self._config
        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise ValueError(f"include_path={config.include_path} is no folder")
        files = locate_checkpoint(Path(str(config.checkpoint)), config.cache_dir).companions
        self._manager = TaskManager(
            include_path=config.include_path,
            include_defaults=config.include_defaults,
            metadata={"tokenizer": str(files), **(config.metadata or {})},
        )
        for name in config.tasks:
            found = self._manager.match_tasks([name])
            if not found:
                raise ValueError(f"tasks: lm-evaluation-harness has no {name!r}; `lm_eval ls tasks` lists them")
            self._tasks += [task for task in found if task not in self._tasks]

    def _evaluate(self, lm: NemoStar) -> None:
        """On rank 0."""
        config = self._config
        tracker = EvaluationTracker(output_path=config.output)
        results: dict[str, Any] | None = simple_evaluate(
            model=lm,
            model_args={"pretrained": str(config.checkpoint)},
            tasks=self._tasks,
            num_fewshot=config.num_fewshot,
            batch_size=config.max_batch_size,
            use_cache=config.use_cache,
            limit=config.limit,
            log_samples=config.log_samples,
            evaluation_tracker=tracker,
            system_instruction=config.system_instruction,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=self._manager,
        )
        assert results is not None, "rank 0 has them"
        samples = results.pop("samples", None)
        tracker.save_results_aggregated(results=results, samples=samples)
        if config.output is not None:
            for task in samples or ():
                tracker.save_results_samples(task_name=task, samples=samples[task])
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
