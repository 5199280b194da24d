"""What the paper's Table 5 says, what hardware can do at best, and what a running service does, per language.

`shapes` `roofline` `table5` `plan` `fertility` are arithmetic on data and need neither torch nor vLLM; `prompts`
`stream` `load` `watch` measure endpoints over HTTP; `stats` `results` `report` `pictures` turn measurements into
numbers, one file format, tables and images.
"""
