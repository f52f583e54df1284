"""Data files to packed examples: sources, forms of rows, encoding by several processes, cache, streams, the plan of
an epoch, preview.

The words for a row on its way, which are used for nothing else:

    source       what the recipe names: a path, how its rows are read, their weight in the mix
    file         one file of a source, or a split on the hub (`DataFile`)
    block        a run of a file's rows, cut between rows and not yet parsed (`Block`); with what is known of the rows
                 before it, a task (`Task`)
    row          an object of a file and its number in it
    conversation, preference, plain text
                 what a form's reader makes of a row (`formats.FORMS`), the same whichever form it had
    example      its tokens and labels (`Example`); of a preference, two that share a prompt (`PairExample`)
    part         the examples of a block in flat arrays (`Part`)
    table        all parts; a dataset is an order over its rows (`Table`, `Dataset`)
    unit         what the order of a run is made of: a row, or a pack of rows that fit one sequence (`Packs`)
    micro-batch  the units that one rank computes together (`Step.batches`), laid out in compute/layout.py

Three paths lead there, through the same functions and in the same order: `Inputs.tasks` cuts, `Encoder.encode` makes a
part of a block. In memory (`dataset.build_dataset`) this process calls them; of large data other processes do, and the
parts go through the cache (`workers.encode_all`); in a stream one other process does while the model trains, for ever
(`stream.RowStream`), and several of them where sources are mixed by weight (`mixstream.MixedStream`).
"""
