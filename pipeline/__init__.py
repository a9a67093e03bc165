"""Ray jobs and media: discover, re-encode, featurise, generate. The only package that imports ray and av."""
