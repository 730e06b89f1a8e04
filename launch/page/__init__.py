"""Pages: their parts, charts and words, drawn as HTML, as Markdown and for a terminal."""
