/* The program in every container of the zoo: `animal health` is well, `animal ill` is not, anything else waits for its end. */
#include <signal.h>
#include <string.h>
#include <unistd.h>

static void end(int signal) {
    (void)signal;
    _exit(0);
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "health") == 0)
        return 0;
    if (argc > 1 && strcmp(argv[1], "ill") == 0)
        return 1;
    signal(SIGTERM, end);
    for (;;)
        pause();
}
