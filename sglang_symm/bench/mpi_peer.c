/* MPI_Allreduce and friends as a peer of `python -m sglang_symm bench`: one line of JSON a size, in place.
 *
 *   mpirun -np P mpi_peer OP ROUNDS SECONDS BYTES...
 *
 * Each line: {"bytes": n, "us": [slowest rank's time a call, one a round], "wrong": elements}. float32 only: MPI knows no
 * bfloat16. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void call(const char* op, float* x, float* out, int n, int world) {
  if (strcmp(op, "all_reduce") == 0) MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  else if (strcmp(op, "broadcast") == 0) MPI_Bcast(x, n, MPI_FLOAT, 0, MPI_COMM_WORLD);
  else if (strcmp(op, "all_gather") == 0) MPI_Allgather(x, n / world, MPI_FLOAT, out, n / world, MPI_FLOAT, MPI_COMM_WORLD);
  else MPI_Reduce_scatter_block(x, out, n / world, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  if (argc < 5) return 2;
  int rank, world;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  const char* op = argv[1];
  const int rounds = atoi(argv[2]);
  const double seconds = atof(argv[3]);
  for (int a = 4; a < argc; a++) {
    const long bytes = atol(argv[a]);
    const int n = (int)(bytes / 4 / world * world > 0 ? bytes / 4 / world * world : world);
    float* x = malloc(sizeof(float) * (size_t)n);
    float* out = malloc(sizeof(float) * (size_t)n);
    for (int i = 0; i < n; i++) x[i] = (float)((i * 7L + rank * 3) % 5 - 2);
    call(op, x, out, n, world);
    long wrong = 0;
    if (strcmp(op, "all_reduce") == 0) {
      for (int i = 0; i < n; i++) {
        float expected = 0;
        for (int r = 0; r < world; r++) expected += (float)((i * 7L + r * 3) % 5 - 2);
        wrong += x[i] != expected;
      }
    }
    memset(x, 0, sizeof(float) * (size_t)n);
    for (int i = 0; i < 3; i++) call(op, x, out, n, world);
    double start = MPI_Wtime();
    for (int i = 0; i < 3; i++) call(op, x, out, n, world);
    double one = (MPI_Wtime() - start) / 3;
    MPI_Bcast(&one, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD);
    int calls = (int)(seconds / (one + 1e-9));
    calls = calls < 1 ? 1 : calls > 20000 ? 20000 : calls;
    if (rank == 0) printf("{\"bytes\": %ld, \"wrong\": %ld, \"us\": [", bytes, wrong);
    for (int round = 0; round < rounds; round++) {
      MPI_Barrier(MPI_COMM_WORLD);
      start = MPI_Wtime();
      for (int i = 0; i < calls; i++) call(op, x, out, n, world);
      double mine = (MPI_Wtime() - start) / calls * 1e6, slowest = 0;
      MPI_Reduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
      if (rank == 0) printf("%s%.3f", round ? ", " : "", slowest);
    }
    if (rank == 0) printf("]}\n");
    fflush(stdout);
    free(x);
    free(out);
  }
  MPI_Finalize();
  return 0;
}
