"""Versions of quantized models: their content, the one in use, and the log of all changes.

::

    folder -> blobs by digest -> manifest, whose digest is the version -> an entry in the name's log
    log: add, verdict, promote, rollback, remove, sign; one immutable file per entry
    alias (champion, candidate) -> the version in its last log entry; one exclusive write moves it

A version exists once its log entry does, which is written last, and nothing is ever overwritten. So
a process that is killed at any point leaves either the old state or the new one.
"""
