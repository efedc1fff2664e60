"""KV read out of an engine and put into it by hand: `kvlab.attach`.

`pages` knows where each layer's KV lies, `written` serves what was written to the prompts that name it, `answers` asks
the engine and compares what it says, `attach` is what a person calls.
"""
