"""What the rules have in common whose replicas differ and are averaged now and then.

exchange.py    the mean of rows of values over a group of replicas, in one go or spread over several updates
codecs.py      how the values travel: as they are, in fewer bits, or only the largest
weights.py     when a stage begins and ends its exchanges, and what is kept in between
rule.py        the parameters all of them have
"""
