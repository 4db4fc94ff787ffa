/*
 * nvrtc.c - a stand-in for NVRTC: what it "compiles" to is a text that tells what it was given
 *
 * Built twice, as version 12.9 and 13.0.  A source that holds "mistake" is refused with a log of many lines.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct program {
    char text[8192];
    size_t length;
    int refused;
};

int stub_compilations; /* read by the test */

static void say(struct program *p, const char *what, const char *text)
{
    const size_t room = sizeof p->text - p->length;
    const int length = snprintf(p->text + p->length, room, "%s%s\n", what, text);
    p->length += (size_t)length < room ? (size_t)length : room - 1;
}

int nvrtcVersion(int *major, int *minor)
{
    *major = STUB_MAJOR;
    *minor = STUB_MAJOR == 12 ? 9 : 0;
    return 0;
}

int nvrtcGetNumSupportedArchs(int *count)
{
    *count = 4;
    return 0;
}

int nvrtcGetSupportedArchs(int *archs)
{
    const int known[] = {70, 120, 80, 90}; /* in no order */
    memcpy(archs, known, sizeof known);
    return 0;
}

int nvrtcCreateProgram(void **program, const char *source, const char *name, int headers, const char *const *texts,
                       const char *const *names)
{
    struct program *p = calloc(1, sizeof *p);
    if (!p)
        return 1;
    say(p, "\177ELF ", name);
    say(p, "source ", source);
    for (int i = 0; i < headers; i++)
        say(p, texts[i][0] ? "header " : "empty header ", names[i]);
    p->refused = strstr(source, "mistake") != NULL;
    *program = p;
    return 0;
}

int nvrtcCompileProgram(void *program, int count, const char *const *options)
{
    struct program *p = program;
    stub_compilations++;
    for (int i = 0; i < count; i++)
        say(p, "option ", options[i]);
    return p->refused ? 6 : 0;
}

int nvrtcDestroyProgram(void **program)
{
    free(*program);
    *program = NULL;
    return 0;
}

static const char lines[] = "a warning\nan error\nline two\nline three\nline four\nline five\nline six\n";

int nvrtcGetProgramLogSize(void *program, size_t *size)
{
    (void)program;
    *size = sizeof lines;
    return 0;
}

int nvrtcGetProgramLog(void *program, char *log)
{
    (void)program;
    memcpy(log, lines, sizeof lines);
    return 0;
}

int nvrtcGetCUBINSize(void *program, size_t *size)
{
    *size = ((struct program *)program)->length;
    return 0;
}

int nvrtcGetCUBIN(void *program, char *cubin)
{
    const struct program *p = program;
    memcpy(cubin, p->text, p->length);
    return 0;
}

int nvrtcGetPTXSize(void *program, size_t *size)
{
    *size = ((struct program *)program)->length + 4;
    return 0;
}

int nvrtcGetPTX(void *program, char *ptx)
{
    const struct program *p = program;
    memcpy(ptx, "ptx\n", 4);
    memcpy(ptx + 4, p->text, p->length);
    return 0;
}

const char *nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
