"""What `ims3 pretrain` trains: one file for each kind of weights, with its length, its cost, its loop and its judge."""
