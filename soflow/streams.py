"""Which stream of random numbers is whose: nobody else may draw from it for the same (seed, step, position).

The ops draw posterior and noise from the streams below `reference.FREE_STREAM`. DROPOUT_STREAM is the last, because
every layer with dropout takes the next one from there on.
"""

from soflow.kernels.reference import FREE_STREAM

TIME_STREAM, NULL_STREAM, AUGMENT_UNIFORM_STREAM, AUGMENT_NORMAL_STREAM, DROPOUT_STREAM = range(
    FREE_STREAM, FREE_STREAM + 5
)
