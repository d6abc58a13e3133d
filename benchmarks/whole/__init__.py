"""What benchmarks/steps.py is made of.

works.py       the sizes that train
models.py      one model: whole, with PEFT's adapters or ours, in one of the forms half the blocks can have
contenders.py  one way to train it, and what a group of them takes, measured in turn
merging.py     merge_and_unload
events.py      steps under a Controller, before, between and after its events
friends.py     torch.compile over a model that is masked and then cut
parts.py       which of these a case is made of; each part has a process of its own
origin.py      where figures come from
reach.py       the ratios that were to be reached
tables.py      what documents show
"""
