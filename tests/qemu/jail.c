/* A container for tests/qemu/run, without an engine: namespaces, a root of its own, a user, capabilities.
 * Which cgroup it is in is its caller's affair. Prints what failed and ends with 1.
 *
 *   jail [-j PID] [-r ROOT] [-u UID] [-c CAPABILITIES] [-g ID] [-w] [-s] [-o] -- COMMAND [ARGUMENT...]
 *
 *   -j  join the PID and network namespace of that process    -w  the root can be written
 *   -c  capabilities that are kept, as a mask in hex           -s  share the host's IPC and UTS namespaces
 *   -o  let it gain privileges             -g  its cgroup's name, where controllers are mounted one by one (v1):
 *                                              it sees its own, and shares the host's cgroup namespace, as Docker does */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int result, const char *what) {
    if (result < 0) {
        fprintf(stderr, "jail: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static void join(const char *pid, const char *space) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/ns/%s", pid, space);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    must(fd, path);
    must(setns(fd, 0), path);
    close(fd);
}

/* Under the root that is about to be left, or not yet entered. */
static void own_cgroups(const char *root, const char *id) {
    const char *all[] = {"memory", "pids", "cpu", "devices"};
    char to[256], from[256];
    snprintf(to, sizeof to, "%s/sys/fs/cgroup", root);
    must(mount("cgroups", to, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755"), to);
    for (int i = 0; i < 4; i++) {
        snprintf(to, sizeof to, "%s/sys/fs/cgroup/%s", root, all[i]);
        snprintf(from, sizeof from, "/sys/fs/cgroup/%s/docker/%s", all[i], id);
        must(mkdir(to, 0755), to);
        must(mount(from, to, 0, MS_BIND, 0), from);
        must(mount("", to, 0, MS_REMOUNT | MS_BIND | MS_RDONLY, 0), to);
    }
}

static void own_root(const char *root, int writable, const char *id) {
    must(mount("", "/", 0, MS_REC | MS_PRIVATE, 0), "making mounts private");
    must(mount(root, root, 0, MS_BIND, 0), root);
    char sys[256];
    snprintf(sys, sizeof sys, "%s/sys", root);
    must(mount("sysfs", sys, "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, 0), sys);
    if (id) own_cgroups(root, id);
    must(chdir(root), root);
    must(syscall(SYS_pivot_root, ".", "."), "pivot_root");
    must(umount2(".", MNT_DETACH), "umount");
    must(chdir("/"), "/");
    must(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0), "/proc");
    must(mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=65536k"), "/dev/shm");
    if (!id && mount("cgroup", "/sys/fs/cgroup", "cgroup2", MS_RDONLY, 0) < 0 && errno != EBUSY && errno != EINVAL)
        must(-1, "/sys/fs/cgroup");
    must(mount("/proc/sys", "/proc/sys", 0, MS_BIND, 0), "/proc/sys");
    must(mount("", "/proc/sys", 0, MS_REMOUNT | MS_BIND | MS_RDONLY, 0), "/proc/sys");
    must(mount("/dev/null", "/proc/kcore", 0, MS_BIND, 0), "/proc/kcore");
    must(mount("/dev/null", "/proc/keys", 0, MS_BIND, 0), "/proc/keys");
    if (!writable) must(mount("", "/", 0, MS_REMOUNT | MS_BIND | MS_RDONLY, 0), "making the root read-only");
}

static void become(int uid, unsigned long long kept, int may_gain) {
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
        if (!(kept >> cap & 1)) must(prctl(PR_CAPBSET_DROP, cap), "dropping a capability");
    must(setgroups(0, 0), "setgroups");
    must(setresgid(uid, uid, uid), "setresgid");
    must(setresuid(uid, uid, uid), "setresuid");
    if (uid == 0) {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct data[2] = {{kept, kept, 0}, {kept >> 32, kept >> 32, 0}};
        must(syscall(SYS_capset, &head, data), "capset");
    }
    if (!may_gain) must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
}

int main(int count, char **words) {
    const char *target = 0, *root = "/", *id = 0;
    int option, uid = 10001, writable = 0, shared = 0, may_gain = 0;
    unsigned long long kept = 0;
    while ((option = getopt(count, words, "+j:r:u:c:g:wso")) != -1) switch (option) {
        case 'j': target = optarg; break;
        case 'r': root = optarg; break;
        case 'u': uid = atoi(optarg); break;
        case 'c': kept = strtoull(optarg, 0, 16); break;
        case 'g': id = optarg; break;
        case 'w': writable = 1; break;
        case 's': shared = 1; break;
        case 'o': may_gain = 1; break;
        default: return 2;
        }
    int spaces = CLONE_NEWNS | (id ? 0 : CLONE_NEWCGROUP);
    if (!shared) spaces |= CLONE_NEWIPC | CLONE_NEWUTS;
    if (target) {
        join(target, "pid");
        join(target, "net");
    } else {
        spaces |= CLONE_NEWPID | CLONE_NEWNET;
    }
    must(unshare(spaces), "unshare");
    pid_t child = fork();
    must(child, "fork");
    if (child == 0) {
        own_root(root, writable, id);
        must(setsid(), "setsid");
        become(uid, kept, may_gain);
        execv(words[optind], words + optind);
        must(-1, words[optind]);
    }
    fprintf(stderr, "pid %d\n", child);
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
