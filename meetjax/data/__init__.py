"""From files and hub sets to padded batches: read records, split by prompt, render and tokenise, bucket by length, load.

Every step that leaves rows out returns an `Audit` that counts them by reason and names the first one as `file:line`.
"""
