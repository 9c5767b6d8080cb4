"""Shell completion: what click completes, and file names where click has nothing to offer.

Images, models and folders are plain strings to click, since they may also be URLs or names on the hub.
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
    """Install the completion for each shell that click supports, in this process."""
    for name in ("bash", "zsh", "fish", "powershell"):
        known: Any = shell_completion.get_completion_class(name)
        if known is not None:  # not every version of click supports PowerShell
            shell_completion.add_completion_class(type(known.__name__, (_OrFiles, known), {}), name)
