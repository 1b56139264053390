# cmake -D FOLDER=where -D PROGRAMS="one two" -P tools/bundle.cmake
# Copies the programs and every library they load, except the C library's own and the GPU driver's,
# to FOLDER, where they run on a machine that has nothing else installed and no older C library.
# The programs look for libraries in lib/ beside them (their run path, set where they are linked).
file(REMOVE_RECURSE "${FOLDER}")
separate_arguments(PROGRAMS)
file(GET_RUNTIME_DEPENDENCIES
  EXECUTABLES ${PROGRAMS}
  RESOLVED_DEPENDENCIES_VAR libraries
  UNRESOLVED_DEPENDENCIES_VAR missing
  PRE_EXCLUDE_REGEXES "^ld-linux" "^libc\\.so" "^libm\\.so" "^libdl\\.so" "^libpthread\\.so"
                      "^librt\\.so" "^libcuda\\.so")
if(missing)
  message(FATAL_ERROR "not found: ${missing}")
endif()
file(COPY ${PROGRAMS} DESTINATION "${FOLDER}")
file(COPY ${libraries} DESTINATION "${FOLDER}/lib" FOLLOW_SYMLINK_CHAIN)
