"""What the screens say, as plain functions from a run to lines of text: no widgets, no terminal."""
