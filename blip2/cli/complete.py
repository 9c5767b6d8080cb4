"""What a shell is told when Tab is pressed: as click has it, and names of files where click knows nothing.

Images, models and folders are plain words to click, since they may also be addresses or names on the hub.
"""

from __future__ import annotations

from typing import Any

from click import shell_completion


class _OrFiles(shell_completion.ShellComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[shell_completion.CompletionItem]:
        found = super().get_completions(args, incomplete)
        if found or not args or incomplete.startswith("-"):
            return found
        return [shell_completion.CompletionItem(incomplete, type="file")]


def use() -> None:
    """For each shell that click knows, from now on in this process."""
    for name in ("bash", "zsh", "fish", "powershell"):
        known: Any = shell_completion.get_completion_class(name)
        if known is not None:  # PowerShell is not known to every click
            shell_completion.add_completion_class(type(known.__name__, (_OrFiles, known), {}), name)
