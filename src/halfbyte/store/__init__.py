"""Versions of quantized models: what each is made of, which one is in use, and how it came to be.

::

    folder -> blobs by digest -> manifest, whose digest is the version -> an entry in the name's log
    log: add, verdict, promote, rollback, remove, one file an entry, never changed
    aliases (champion, candidate) = what the log says last: one exclusive write moves one

A version exists once its log entry does, which is written last; nothing is ever overwritten, so a
process that is killed at any point leaves either the old state or the new one.
"""
