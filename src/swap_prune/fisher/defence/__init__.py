"""Defences of gradients: what is made of rows of G, and of the slopes that are means of gradients, that noise is in.

- ``rank``: the leading outer products of each row, which true gradients have and noise has not;
- ``robust``: entries winsorised against a model of rows times columns, trimmed means, medians of means;
- ``outliers``: rows that are far larger than their like;
- ``treatment``: what can be made of rows and of their mean;
- ``exact``: which layers have gradients of rank 1;
- ``looks``: whether there is noise, and which of these brings a layer's rows nearest to the true ones, by taking the
  same gradients twice;
- ``gradients``: what is done in one stage, layer by layer.

Place in the pipeline: between capture and regression, and where slopes are averaged.
"""
