"""Files that come in and go out, for every room above.

`reading` opens input: regular files and pipes, of bounded size, strictly decoded. `writing` puts output in
place whole or not at all. `records` is JSON Lines with an end record. `kinds` says what a file is, and
`text` makes text from a file safe to print.
"""
