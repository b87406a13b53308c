"""An answer as markdown on a terminal, through rich, while it is made. What is finished is printed for good and scrolls
away as any text does; only the block that is still growing is drawn again, and of that only the lines that changed.
"""

import io
import os
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from cli.console import CONTROLS

LEAST_INTERVAL_S = 0.05
DRAWING_SHARE = 0.1
"""At most this share of the time goes into drawing, however long a block has become."""
CODE_THEME = "ansi_dark"
"""In the terminal's own colours, on its own background."""
THOUGHT = ("<think>", "</think>")

# No HTML: what looks like it is shown as it is rather than swallowed.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class MarkdownView:
    """One answer on a terminal."""

    def __init__(self, stream: TextIO, *, in_thought: bool = False) -> None:
        """in_thought: the answer begins within a thought, as if "<think>" had come already."""
        self._screen = _Screen(stream)
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False, markup=False, emoji=False)
        self._text = THOUGHT[0] if in_thought else ""
        """What is not printed for good: the last block."""
        self._lead = False
        """Whether a line stays free before what comes next."""
        self._above = 0
        """Lines of the last block that are printed for good, because the screen has no room for them."""
        self._next_s = 0.0
        self._screen.draw(["\x1b[2m…\x1b[0m"])

    def write(self, text: str) -> None:
        self._text += text.translate(CONTROLS)
        began = time.monotonic()
        if text and began >= self._next_s:
            self._update()
            spent = time.monotonic() - began
            self._next_s = began + spent + max(LEAST_INTERVAL_S, spent / DRAWING_SHARE)

    def end(self, *, whole: bool) -> None:
        self._update()
        self._print(self._text)
        self._screen.keep()

    def _update(self) -> None:
        finished, rest = split(self._text)
        if finished:
            self._print(finished)
            self._text = rest
        lines = self._lines(self._text)
        room = self._screen.room()
        if len(lines) - self._above > room:
            there = len(lines) - room
            self._screen.draw(lines[self._above : there])
            self._screen.keep()
            self._above = there
        self._screen.draw(lines[self._above :])

    def _print(self, text: str) -> None:
        lines = self._lines(text)
        self._screen.draw(lines[self._above :])
        self._screen.keep()
        self._lead, self._above = self._lead or bool(lines), 0

    def _lines(self, text: str) -> list[str]:
        """Rows of the terminal, each with its own colours and nothing else that steers one."""
        if text.lstrip().startswith(THOUGHT[0]):
            blocks: list[RenderableType] = [Text(_thought(text), "dim italic")]
        else:
            blocks = [Answer(tokens) for tokens in _blocks(_PARSER.parse(text))]
        lines: list[str] = []
        for block in blocks:
            rows = self._rows(block)
            lines += ["", *rows] if rows and (lines or self._lead) else rows
        return lines

    def _rows(self, block: RenderableType) -> list[str]:
        """Without blank ones at either end."""
        file = self._console.file
        assert isinstance(file, io.StringIO)
        self._console.print(_Safe(block), width=self._screen.columns(), crop=False)
        rows = file.getvalue().split("\n")
        file.seek(0)
        file.truncate()
        filled = [i for i, row in enumerate(rows) if row]
        return rows[filled[0] : filled[-1] + 1] if filled else []


def split(text: str) -> tuple[str, str]:
    """The blocks of markdown that nothing which may still come can change, and the rest. A thought is a block."""
    start, end = THOUGHT
    if text.lstrip().startswith(start):
        before, mark, after = text.partition(end)
        return (before + mark, after) if mark else ("", text)
    whole = text[: text.rfind("\n") + 1]  # half a line may yet become a part of the block before it
    begins = [token.map[0] for token in _PARSER.parse(whole) if token.level == 0 and token.map is not None]
    if len(begins) < 2:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: begins[-1]]) + "\n", "\n".join(lines[begins[-1] :])


def _blocks(tokens: list[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that is in no other."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _thought(text: str) -> str:
    start, end = THOUGHT
    return text.lstrip().removeprefix(start).partition(end)[0].strip()


class _Screen:
    """The last lines of a terminal, which can be drawn again: the cursor stands at the beginning of the line below."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: list[str] = []
        self._width = self.columns()

    def columns(self) -> int:
        return max(20, os.get_terminal_size(self._stream.fileno()).columns or 80)

    def room(self) -> int:
        """Lines that can be reached to draw them again."""
        return max(1, (os.get_terminal_size(self._stream.fileno()).lines or 24) - 1)

    def draw(self, lines: Sequence[str]) -> None:
        """Show these in the place of those that are shown."""
        if self._width != self.columns():  # the terminal has laid those out anew, nobody knows how
            self._width, self._shown = self.columns(), []
        same = 0
        while same < min(len(lines), len(self._shown)) and lines[same] == self._shown[same]:
            same += 1
        up = len(self._shown) - same
        text = (f"\x1b[{up}A\r\x1b[J" if up else "") + "".join(f"{line}\n" for line in lines[same:])
        if text:
            self._stream.write(text)
            self._stream.flush()
        self._shown = list(lines)

    def keep(self) -> None:
        """What is shown stays; the next is drawn below it."""
        self._shown = []


class _Safe:
    """Whatever it shows, with no control characters but the colours that rich itself puts there."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in Segment.split_lines(console.render(self._inner, options)):
            safe = [Segment(text.translate(CONTROLS), style) for text, style, control in line if control is None]
            yield from _without_end(safe)
            yield Segment.line()


def _without_end(line: list[Segment]) -> list[Segment]:
    """Without the blanks that fill a line to the terminal's edge: who copies it does not want them."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    if line:
        line = [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
    return line


# ---- What differs from rich's own markdown ----


class _Code(CodeBlock):
    """Between its fences, and without margins, so that it can be copied out of a terminal."""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> "_Code":
        return cls(token.info.split(" ")[0] if token.info else "", markdown.code_theme)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"```{self.lexer_name}", "dim")
        code = str(self.text).removesuffix("\n")
        yield Syntax(code, self.lexer_name or "text", theme=self.theme, word_wrap=True, background_color="default")
        yield Text("```", "dim")


class _Heading(Heading):
    """To the left, as a text's headings are."""

    LEVEL_ALIGN: ClassVar = {}


class _Item(ListItem):
    """With the mark that was written before it."""

    def render_bullet(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return self._render(console, options, "• ")

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        return self._render(console, options, f"{number}. ".rjust(len(str(last_number)) + 2))

    def _render(self, console: Console, options: ConsoleOptions, mark: str) -> RenderResult:
        inside = options.update(width=max(1, options.max_width - len(mark)))
        for line in console.render_lines(self.elements, inside, pad=False):
            yield Segment(mark)
            yield from line
            yield Segment.line()
            mark = " " * len(mark)


class Answer(Markdown):
    """Blocks of markdown. Line breaks stay as a model makes them, addresses and images as they are written."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "list_item_open": _Item,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = tokens
        for token in tokens:
            if token.children:
                token.children = _plainer(token.children)


def _plainer(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        elif token.type == "image":
            token = Token("text", "", 0, content=f"![{token.content}]({token.attrs.get('src', '')})")
        elif token.type == "link_close" and result[-1].type == "text" and result[-2].type == "link_open":
            address = str(result[-2].attrs.get("href", ""))
            if result[-1].content in (address, address.removeprefix("mailto:")):
                del result[-2]  # an address that is its own text
                continue
        result.append(token)
    return result
