# Device code: every src/cuda/kernels/*.cu compiled by nvcc where there is one, and embedded with its text.
#
#   BNB_NVCC=off         no nvcc: the library holds the texts alone, which NVRTC compiles at run time
#   BNB_NVCC=/path/nvcc  this one; unset: the one on PATH or in /usr/local/cuda/bin, if any
#   BNB_CUDA_ARCHS       "80;90a", for development; "release" is every card from Turing on, and PTX for later ones
#
# One assembler file holds everything: .incbin of the binaries, the sources and what they include, and the two tables of
# cuda/image.h that point to them.

set(BNB_CUDA_DEVELOPMENT_ARCHS 80 90a)
set(BNB_CUDA_ARCHS "${BNB_CUDA_DEVELOPMENT_ARCHS}" CACHE STRING "architectures that nvcc builds for: numbers, 75-virtual for PTX, or release")
set(BNB_CUDA_RELEASE_ARCHS 75 80 86 89 90a 100 120 75-virtual)

# NUMERICS rule 1: no contraction but in matrix products, gemm*.cu; cuda/jit.c gives NVRTC the same flags.
set(BNB_CUDA_FLAGS -O3 -std=c++17 --ftz=false --prec-div=true --prec-sqrt=true -Werror all-warnings)
set(BNB_CUDA_CONTRACTED "^gemm")

# Set in the caller: BNB_NVCC, empty where there is none, and BNB_NVCC_FLAGS.  A compiler or architectures that were asked
# for must work.
function(bnb_find_nvcc)
    set(asked ON)
    if((NOT DEFINED BNB_NVCC OR BNB_NVCC MATCHES "-NOTFOUND$") AND BNB_CUDA_ARCHS STREQUAL "${BNB_CUDA_DEVELOPMENT_ARCHS}")
        set(asked OFF)
    endif()
    find_program(BNB_NVCC nvcc PATHS /usr/local/cuda/bin DOC "nvcc, or off")
    if(NOT BNB_NVCC)
        message(STATUS "device code: no nvcc, kernels are compiled at run time")
        set(BNB_NVCC "" PARENT_SCOPE)
        return()
    endif()
    set(archs ${BNB_CUDA_ARCHS})
    if(archs STREQUAL "release")
        set(archs ${BNB_CUDA_RELEASE_ARCHS})
    endif()
    set(flags ${BNB_CUDA_FLAGS})
    foreach(arch ${archs})
        if(arch MATCHES "^([0-9]+[af]?)-virtual$")
            list(APPEND flags -gencode arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1})
        elseif(arch MATCHES "^[0-9]+[af]?$")
            list(APPEND flags -gencode arch=compute_${arch},code=sm_${arch})
        else()
            message(FATAL_ERROR "BNB_CUDA_ARCHS holds ${arch}, expected e.g. 80, 90a, 75-virtual")
        endif()
    endforeach()
    # Drivers that load what nvcc 13 makes can unpack its tightest compression.
    execute_process(COMMAND ${BNB_NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
    if(version MATCHES "release (1[3-9]|[2-9][0-9])")
        list(APPEND flags --compress-mode=size)
    endif()
    if(NOT BNB_NVCC_WORKS STREQUAL "${BNB_NVCC} ${flags}")
        set(probe ${CMAKE_CURRENT_BINARY_DIR}/device/probe)
        file(WRITE ${probe}.cu "extern \"C\" __global__ void probe(float *x) { *x *= 2.0f; }\n")
        execute_process(COMMAND ${BNB_NVCC} ${flags} -fatbin -o ${probe}.fatbin ${probe}.cu
            RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
        if(failed)
            set(kind WARNING)
            if(asked)
                set(kind FATAL_ERROR)
            endif()
            message(${kind} "device code: ${BNB_NVCC} does not compile for ${archs}, "
                "-DBNB_NVCC=off goes on without:\n${output}")
            set(BNB_NVCC "" PARENT_SCOPE)
            return()
        endif()
        set(BNB_NVCC_WORKS "${BNB_NVCC} ${flags}" CACHE INTERNAL "the nvcc and flags that were tried")
    endif()
    message(STATUS "device code: ${BNB_NVCC}, architectures ${archs}")
    set(BNB_NVCC ${BNB_NVCC} PARENT_SCOPE)
    set(BNB_NVCC_FLAGS ${flags} PARENT_SCOPE)
endfunction()

# tables.cuh: the numbers of core/codebook.c and core/maps.c as device code, printed by a program of the host.
function(bnb_device_tables output)
    add_executable(device_tables tools/device_tables.c src/core/codebook.c src/core/maps.c)
    target_include_directories(device_tables PRIVATE include src)
    target_link_libraries(device_tables PRIVATE bnb_flags m)
    add_custom_command(OUTPUT ${output} COMMAND device_tables > ${output}.new
        COMMAND ${CMAKE_COMMAND} -E rename ${output}.new ${output} DEPENDS device_tables VERBATIM)
endfunction()

# What the files include, and what that includes, by name below src/: the headers that NVRTC is given.
function(bnb_device_headers output)
    set(src ${CMAKE_CURRENT_SOURCE_DIR}/src)
    set(queue ${ARGN})
    set(found "")
    while(queue)
        list(POP_FRONT queue file)
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
        file(STRINGS ${file} lines REGEX "^[ \t]*#[ \t]*include")
        foreach(line ${lines})
            string(REGEX REPLACE "^[^\"]*\"([^\"]*)\".*$" "\\1" name "${line}")
            if(name STREQUAL "tables.cuh" OR name IN_LIST found OR line MATCHES "<")
                continue()
            elseif(NOT EXISTS ${src}/${name})
                message(FATAL_ERROR "${file} includes ${name}, expected a name below src/ or tables.cuh")
            endif()
            list(APPEND found ${name})
            list(APPEND queue ${src}/${name})
        endforeach()
    endwhile()
    list(SORT found)
    set(${output} ${found} PARENT_SCOPE)
endfunction()

# One file as bytes, and one row of a table.  Appends to the caller's `blobs`, `depends`, and the text named by `table`.
macro(bnb_embed table name binary source)
    math(EXPR row "${row} + 1")
    string(APPEND blobs "\n.Lname${row}: .string \"${name}\"\n    .balign 64\n.Lbinary${row}:\n")
    if(NOT "${binary}" STREQUAL "")
        string(APPEND blobs "    .incbin \"${binary}\"\n")
        list(APPEND depends ${binary})
    endif()
    string(APPEND blobs ".Lbinary${row}_end:\n    .balign 64\n.Lsource${row}:\n    .incbin \"${source}\"\n"
        ".Lsource${row}_end: .byte 0\n")
    list(APPEND depends ${source})
    string(APPEND ${table} "    .quad .Lname${row}, .Lbinary${row}, .Lbinary${row}_end - .Lbinary${row}, "
        ".Lsource${row}, .Lsource${row}_end - .Lsource${row}\n")
endmacro()

function(bnb_device_images target)
    bnb_find_nvcc()
    set(folder ${CMAKE_CURRENT_BINARY_DIR}/device)
    set(kernels ${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/kernels)
    file(MAKE_DIRECTORY ${folder})
    bnb_device_tables(${folder}/tables.cuh)

    set(row 0)
    set(image_rows "")
    set(header_rows "")
    set(blobs "")
    set(depends "")
    file(GLOB sources CONFIGURE_DEPENDS ${kernels}/*.cu)
    foreach(source ${sources})
        get_filename_component(name ${source} NAME_WE)
        set(binary "")
        if(BNB_NVCC)
            set(binary ${folder}/${name}.fatbin)
            set(fmad false)
            if(name MATCHES "${BNB_CUDA_CONTRACTED}")
                set(fmad true)
            endif()
            add_custom_command(OUTPUT ${binary}
                COMMAND ${BNB_NVCC} -fatbin ${BNB_NVCC_FLAGS} --fmad=${fmad} -I${CMAKE_CURRENT_SOURCE_DIR}/src -I${folder}
                    -MD -MF ${binary}.d -o ${binary} ${source}
                DEPENDS ${source} ${folder}/tables.cuh DEPFILE ${binary}.d
                COMMENT "Building device code ${name}.fatbin" VERBATIM)
        endif()
        bnb_embed(image_rows ${name} "${binary}" ${source})
    endforeach()
    list(LENGTH sources image_count)

    bnb_device_headers(headers ${sources})
    foreach(header ${headers})
        bnb_embed(header_rows ${header} "" ${CMAKE_CURRENT_SOURCE_DIR}/src/${header})
    endforeach()
    bnb_embed(header_rows tables.cuh "" ${folder}/tables.cuh)
    list(LENGTH headers header_count)
    math(EXPR header_count "${header_count} + 1")

    configure_file(src/cuda/images.S.in ${folder}/images.S @ONLY)
    set_source_files_properties(${folder}/images.S PROPERTIES OBJECT_DEPENDS "${depends}"
        COMPILE_OPTIONS "$<$<C_COMPILER_ID:Clang,AppleClang>:-Wno-unused-command-line-argument>")
    target_sources(${target} PRIVATE ${folder}/images.S)
endfunction()
