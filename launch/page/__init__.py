"""How a page is drawn: parts, charts, words; as HTML, Markdown and for a terminal."""
