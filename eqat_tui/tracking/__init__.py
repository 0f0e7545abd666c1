"""``eqat log-to``: what a run's log says, handed on to other programs that draw it.

The log is only ever read, by a process of its own: whatever becomes of that process, of the other program or
of the disk that it writes to, the run goes on.
"""
