// What g++ and its headers take from newer systems than a wheel is for; see wheel.
#include <new>
#include <sstream>

// Of glibc 2.32: whether there is one thread only. Never said, which is right and hardly slower.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

// Of libstdc++ 11 and 12.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;

}  // namespace std
