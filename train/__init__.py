"""Lightning: V-AURA training from feature shards. The only package that imports lightning; sees features and codes only."""
