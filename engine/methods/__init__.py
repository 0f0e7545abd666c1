"""The algorithms, one a file: ``rtn``, ``block_ap``, ``e2e_qp``. None of them knows about files or events."""
