"""How fast exports are and what memory they take, each loader in a process of its own (``eqat bench``)."""
