"""Scores the responses of compared runs by a command that reads what `sr-dpo generate` wrote and writes numbers.

Each line of its input is JSON with all keys of the prompt's line and `response`; it writes one finite number a line,
more for a better response. A reward model at an endpoint is such a command, and so is
`python -m sr_dpo_jax.commands.demo.measure`, the truth of the demo's world.
"""

import dataclasses
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np

from sr_dpo_jax.commands.tune import EXIT_DONE, EXIT_PREEMPTED, Child
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.files import read_lines, write_text
from sr_dpo_jax.errors import RunError, UsageError


@dataclasses.dataclass(frozen=True)
class Generation:
    """Names the prompts that compared runs respond to, and the command that scores the responses."""

    prompts: Path
    scorer: str | None
    """The command, as for a shell; None: responses are not scored."""

    def check(self, config: Config) -> None:
        """Raises UsageError where there are no prompts, or the scorer is no command that can run beside these runs."""
        if not self.prompts.is_file() or not read_lines(self.prompts):
            raise UsageError(f"--prompts {self.prompts}: holds no prompts; name a file as sr-dpo generate takes")
        if self.scorer is None:
            return
        command = self._command()
        if not command or shutil.which(command[0]) is None:
            raise UsageError(f"--scorer {self.scorer}: no such command; name one that is installed, or its path")
        if config.distributed.processes > 1:
            raise UsageError("--scorer runs beside one process; compare without it, and score RUN/responses.jsonl then")

    def score(self, responses: Path, scores: Path, child: Child) -> int:
        """Writes the scores of a file of responses, and returns the exit code: 0, or 75 after a signal.

        Raises:
          RunError: the command failed.
          UsageError: it did not write one finite number for each response.
        """
        with responses.open("rb") as given, tempfile.TemporaryFile() as taken:
            code = child.call(self._command(), stdin=given, stdout=taken)
            taken.seek(0)
            said = taken.read().decode("utf-8", "replace")
        if code == EXIT_PREEMPTED:
            return code
        if code != EXIT_DONE:
            raise RunError(f"--scorer {self.scorer}: ended with exit code {code}; it says above why")
        self._require_numbers(said.split(), len(read_lines(responses)))
        write_text(scores, said)
        return EXIT_DONE

    def _command(self) -> list[str]:
        try:
            return shlex.split(self.scorer or "")
        except ValueError as error:
            raise UsageError(f"--scorer {self.scorer}: {error}; quote it as for a shell") from error

    def _require_numbers(self, words: list[str], count: int) -> None:
        try:
            good = len(words) == count and np.isfinite([float(word) for word in words]).all()
        except ValueError:
            good = False
        if not good:
            raise UsageError(
                f"--scorer {self.scorer}: has to write one finite number on a line for each of {count} responses, and "
                f"nothing else; it wrote {len(words)} words: correct it, and the same command goes on from here"
            )


def mean_score(scores: Path) -> float:
    """Reads what `Generation.score` wrote, and gives its mean."""
    return float(np.mean([float(word) for word in scores.read_text(encoding="utf-8").split()]))
