"""A local folder of byte ranges that came from an object store, with a limit in bytes. Any number of processes may share it.

A file is a range of a version of an object, named by a hash of all three, and appears whole or not at all. What is in the folder counts against the
limit before it is written; the count is kept in a file that processes lock, and is taken anew from the folder when it reaches the limit, so that what
a killed process counted and did not write is found out.

When it is full, what has not been used for an hour goes first, longest unused first. What is left then is in somebody's use, and nothing is added: a
shuffled epoch that pushed out what comes later in it would find hardly anything (for half a dataset 15 % against 50 %).

Knows bytes and files. Knows no samples.
"""
